"""Lines out of byte streams: bounded in memory, exact about where each one stood."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its line end. `text` is None when it was longer than allowed."""

    number: int
    text: bytes | None
    size: int


class LineSplitter:
    """Cuts a stream of byte chunks into lines; keeps no more than one line, and no line too long.

    Takes LF and CRLF, a byte order mark before the first line, and a last line without an end.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that `chunk` completes."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._keep(piece)
            yield self._take()
        self._keep(rest)

    def finish(self) -> Iterator[Line]:
        """The last line, if it had no line end."""
        if self._size:
            yield self._take()

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max:
            self._parts.clear()  # what is too long is counted, not held
        elif piece:
            self._parts.append(piece)

    def _take(self) -> Line:
        self._number += 1
        text = b"".join(self._parts) if self._size <= self._max else None
        line = Line(self._number, text, self._size)
        self._parts.clear()
        self._size = 0
        if text is None:
            return line
        if self._number == 1:
            text = text.removeprefix(BOM)
        return Line(line.number, text.removesuffix(b"\r"), line.size)


def split_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[list[Line]]:
    """Lines of a whole stream, in the batches in which the chunks complete them."""
    splitter = LineSplitter(max_line_bytes)
    for chunk in chunks:
        if lines := list(splitter.feed(chunk)):
            yield lines
    if last := list(splitter.finish()):
        yield last
