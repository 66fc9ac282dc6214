"""The check of a batch's input file: every line is a request, with an id of its own, for one model."""

import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson

from streamsyn.io.durable import disk_errors
from streamsyn.io.json_rows import decode_json, decode_row
from streamsyn.io.rows import Line, split_lines
from streamsyn.plain_text import message, short_repr
from streamsyn.seeds.inbox import Inbox
from streamsyn.seeds.request_lines import BadRequestLine, RequestLine, read_request

MAX_REQUESTS: Final = 200_000
"""Requests of a batch: the ids of all are held while a file is checked."""
_MAX_ERRORS: Final = 100
"""Errors that are listed."""
_CHUNK_BYTES: Final = 2**20


@dataclass(slots=True)
class InputCheck:
    """What a check of an input file found.

    Attributes:
        total: Number of requests.
        model: The model that they all name.
        errors: What is wrong, as OpenAI's batches show it: code, line, message, param.
    """

    total: int = 0
    model: str = ""
    errors: list[dict[str, Any]] = field(default_factory=list)
    _ids: set[bytes] = field(default_factory=set)

    def run(self, path: Path, max_line_bytes: int) -> "InputCheck":
        """Check all lines. Blocks on the disk.

        Raises:
            SinkError: The file cannot be read.
        """
        with disk_errors(f"read {path}"):
            for line in _lines(path, max_line_bytes):
                try:
                    self._take(line, max_line_bytes)
                except BadRequestLine as error:
                    self._note(error.code, str(error), line.number, error.param)
                if len(self.errors) >= _MAX_ERRORS or self.total > MAX_REQUESTS:
                    break
        if self.total > MAX_REQUESTS:
            self._note("too_many_tasks", f"A batch has at most {MAX_REQUESTS:,} requests: split the file.")
        elif not self.total and not self.errors:
            self._note("empty_file", "The file has no requests.")
        self._ids.clear()
        return self

    def _take(self, line: Line, max_line_bytes: int) -> None:
        request = _request_in(line, max_line_bytes)
        self.total += 1
        key = blake2b(request.custom_id.encode(), digest_size=16).digest()
        if key in self._ids:
            text = f"The custom_id {short_repr(request.custom_id)} is used by an earlier line."
            raise BadRequestLine("duplicate_custom_id", "custom_id", text)
        self._ids.add(key)
        if not request.model:
            raise BadRequestLine(
                "missing_required_parameter", "body.model", "Missing required parameter: 'body.model'."
            )
        self.model = self.model or request.model
        if request.model != self.model:
            text = f"All requests of a batch name one model: {short_repr(self.model)} before, here "
            raise BadRequestLine("model_mismatch", "body.model", f"{text}{short_repr(request.model)}.")

    def _note(self, code: str, text: str, line: int | None = None, param: str | None = None) -> None:
        self.errors.append({"code": code, "line": line, "message": message(text), "param": param or None})


def _lines(path: Path, max_line_bytes: int) -> Iterator[Line]:
    with path.open("rb") as file:
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        for batch in split_lines(chunks, max_line_bytes):
            yield from (line for line in batch if line.text is None or line.text.strip())


def _request_in(line: Line, max_line_bytes: int) -> RequestLine:
    if line.text is None:
        text = f"The line has {line.size} bytes, more than seeds.max_line_bytes = {max_line_bytes}."
        raise BadRequestLine("line_too_long", "", text)
    try:
        row, _ = decode_row(line.text)
    except orjson.JSONDecodeError as error:
        text = f"This line is not parseable as valid JSON: {error}"
        raise BadRequestLine("invalid_json_line", "", text) from None
    if not isinstance(row, dict):
        raise BadRequestLine("invalid_json_line", "", "This line is not a JSON object.")
    return read_request(row)


def custom_ids(path: Path) -> Generator[str, None, None]:
    """Yield the ids of the requests in a file that was checked. Blocks on the disk.

    Raises:
        SinkError: The file cannot be read.
    """
    with disk_errors(f"read {path}"):
        for line in _lines(path, sys.maxsize):
            yield decode_json(line.text or b"")["custom_id"]


def submit(path: Path, inbox: Inbox) -> None:
    """Put the requests in a file into an inbox; those that are there already are skipped. Blocks on the disk.

    Raises:
        SinkError: The file cannot be read, or the inbox not be written.
    """
    with disk_errors(f"read {path}"), path.open("rb") as file, inbox.submission() as submission:
        while chunk := file.read(_CHUNK_BYTES):
            submission.feed(chunk)
        submission.finish()
