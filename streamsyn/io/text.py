"""The text of files in UTF-8, in pieces of a bounded size."""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

from streamsyn.io.content import HEAD_BYTES, encoding_hint, is_utf8, problem_of
from streamsyn.io.decompression import READ_ERRORS, file_chunks
from streamsyn.io.places import RemoteFile
from streamsyn.io.rows import ReadOptions


def read_text(
    place: Path | RemoteFile,
    options: ReadOptions,
    on_read: Callable[[int], None] | None = None,
    *,
    of_rows: bool = False,
) -> Iterator[str]:
    """The text of a file in UTF-8, compressed or not, in pieces that may end anywhere.

    Args:
        place: The file.
        options: For messages.
        on_read: Called with the offset that has been read to.
        of_rows: Whether the file has rows, not plain text.

    Raises:
        ConfigError: It cannot be read to its end, or is not valid UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    chunk = b""
    try:
        for number, chunk in enumerate(file_chunks(place, on_read)):
            if not number and (problem := problem_of(chunk[:HEAD_BYTES], of_rows=of_rows)) is not None:
                raise options.error(place, problem)
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = next((line for line in chunk.split(b"\n") if not is_utf8(line)), b"")
        raise options.error(place, f"is not valid UTF-8: {error}{encoding_hint(line)}") from error
    except READ_ERRORS as error:
        raise options.error(place, f"cannot be read to its end: {error}") from error
