"""Byte streams cut into lines with their numbers, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its line end.

    Attributes:
        number: Counts from 1.
        text: None if the line was longer than allowed.
        size: Its length in bytes, without the LF.
    """

    number: int
    text: bytes | None
    size: int


class LineSplitter:
    """Cuts a stream of byte chunks into lines; holds at most one line, and none above the limit.

    Accepts LF and CRLF, a byte order mark before the first line, and a last line without a line end.

    Args:
        max_line_bytes: The longest line that is kept, without its LF.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def endless_line(self) -> int | None:
        """The number of the line whose end has not come yet, if it is above the limit already."""
        return self._number + 1 if self._size > self._max else None

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that `chunk` completes."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._keep(piece)
            yield self._take()
        self._keep(rest)

    def finish(self) -> Iterator[Line]:
        """The last line, if it has no line end."""
        if self._size:
            yield self._take()

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max:
            self._parts.clear()  # a line above the limit is counted, not held
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
    """The lines of a whole stream; each batch holds the lines that one chunk completes."""
    splitter = LineSplitter(max_line_bytes)
    for chunk in chunks:
        if lines := list(splitter.feed(chunk)):
            yield lines
    if last := list(splitter.finish()):
        yield last
