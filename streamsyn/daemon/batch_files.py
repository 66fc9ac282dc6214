"""The files of a batch: its input is checked, its output and its errors are written while its run goes on.

Every line of the input is a request, with an id of its own, for one model. Every outcome is a line of the
output file, as OpenAI writes it; a failure is a line of both files. A failure has `error` set and, as with
OpenAI, a response whose status is not 200, so that no client takes it for an answer. What is in the files
follows from the log: after a kill they are continued from their last whole line.

Source: https://platform.openai.com/docs/api-reference/batch/request-output
"""

import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final

import orjson

from streamsyn.following.run_rows import RunRows
from streamsyn.io.durable import disk_errors
from streamsyn.io.json_rows import decode_json, decode_row
from streamsyn.io.rows import Line, split_lines
from streamsyn.plain_text import message, short_repr
from streamsyn.records import RejectReason, draft_key
from streamsyn.seeds.inbox import Inbox
from streamsyn.seeds.request_lines import BadRequestLine, RequestLine, read_request

MAX_REQUESTS: Final = 200_000
"""Requests of a batch: the ids of all are held while a file is checked."""
_MAX_ERRORS: Final = 100
"""Errors that are listed."""
_CHUNK_BYTES: Final = 2**20
CANCELLED: Final = "batch_cancelled"
EXPIRED: Final = "batch_expired"
_NEVER_SENT: Final[Mapping[str, str]] = {
    CANCELLED: "The batch was cancelled before this request was executed.",
    EXPIRED: "This request could not be executed before the completion window expired.",
}
_STATUS: Final[Mapping[str, int]] = {
    RejectReason.REQUEST_REFUSED: 400,
    RejectReason.TIMEOUT: 504,
    RejectReason.SERVER_UNAVAILABLE: 503,
    RejectReason.BROKEN_RESPONSE: 502,
}
"""HTTP statuses of failures, by their reasons; any other is 500."""
_ROWS: Final = 1024
"""Rows that are read at once."""


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
        key = _digest(request.custom_id)
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


class BatchOutput:
    """Writes both files. For one thread at a time; all calls block on the disk.

    Args:
        run_root: The run directory of the batch.

    Attributes:
        answers: Answers in the output file.
        failures: Failures in the output file.

    Raises (all methods):
        SinkError: The disk failed, or a row of the log cannot be read.
    """

    def __init__(self, run_root: Path) -> None:
        self._rows = {kind: RunRows(run_root, kind) for kind in ("contexts", "rejects")}
        self._output: _Lines | None = None
        self._errors: _Lines | None = None
        self._noted = 0
        self.answers = self.failures = 0

    @property
    def output_bytes(self) -> int:
        """Size of the output file."""
        return 0 if self._output is None else self._output.bytes

    @property
    def error_bytes(self) -> int:
        """Size of the error file."""
        return 0 if self._errors is None else self._errors.bytes

    def open_output(self, path: Path) -> None:
        """Continue the output file, which exists."""
        self._output, self.answers, self.failures = _continued(path)

    def open_errors(self, path: Path) -> None:
        """Continue the error file, which exists."""
        self._errors, _, self._noted = _continued(path)

    def catch_up(self, contexts: int, rejects: int) -> None:
        """Write what the first rows of the log hold and the files lack.

        Args:
            contexts: Number of contexts that may be read.
            rejects: Number of rejects; if there is one, the error file must be open.
        """
        assert self._output is not None, "opened"
        while some := self._read("contexts", self.answers, contexts):
            self._output.append(map(answer_line, some))
            self.answers += len(some)
        while some := self._read("rejects", self.failures, rejects):
            self._output.append(map(failure_line, some))
            self.failures += len(some)
        while some := self._read("rejects", self._noted, rejects):
            assert self._errors is not None, "opened"
            self._errors.append(map(failure_line, some))
            self._noted += len(some)

    def rows_in_log(self) -> dict[str, int]:
        """Return how many rows of each kind are on disk; only if no process writes the log."""
        found = {"contexts": self.answers, "rejects": self.failures}
        for kind, rows in self._rows.items():
            while some := rows.lines(found[kind], _ROWS):
                found[kind] += len(some)
        return found

    def add_never_sent(self, source: Path, code: str) -> None:
        """Write to the error file, which is open, which requests have no outcome.

        Args:
            source: The input file of the batch.
            code: Why: CANCELLED or EXPIRED.
        """
        assert self._output is not None, "opened"
        assert self._errors is not None, "opened"
        done = {_digest(row["custom_id"]) for row in self._output.rows()}
        with closing(custom_ids(source)) as ids:
            unfinished = (one for one in ids if _digest(one) not in done)
            while lines := [never_sent_line(one, code) for one in islice(unfinished, _ROWS)]:
                self._errors.append(lines)

    def close(self) -> None:
        """Sync and close both files."""
        for file in (self._output, self._errors):
            if file is not None:
                file.close()
        self._output = self._errors = None

    def _read(self, kind: str, first: int, end: int) -> list[dict[str, Any]]:
        return self._rows[kind].rows(first, min(_ROWS, end - first)) if end > first else []


def answer_line(row: Mapping[str, Any]) -> bytes:
    """The line for a context of the recipe `chat`."""
    body = row["steps"][-1]["body"]
    response = {"status_code": 200, "request_id": str(body.get("id") or ""), "body": body}
    return _line(row, response, None)


def failure_line(row: Mapping[str, Any]) -> bytes:
    """The line for a reject."""
    reason, detail = row["reason"], row["detail"]
    status = _STATUS.get(reason, 500)
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": detail, "type": kind, "param": None, "code": reason}
    response = {"status_code": status, "request_id": "", "body": {"error": error}}
    return _line(row, response, {"code": reason, "message": detail})


def never_sent_line(custom_id: str, code: str) -> bytes:
    """The line for a request that was not sent before its batch ended."""
    error = {"code": code, "message": _NEVER_SENT[code]}
    return _line({"seed_id": custom_id, "draft": 0}, None, error)


def _line(row: Mapping[str, Any], response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    custom_id = row["seed_id"]
    request_id = f"batch_req_{draft_key(custom_id, row['draft']).hex()}"
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


class _Lines:
    """A file of JSON lines that is open for appending; `bytes` is its size."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.bytes = size
        with disk_errors(f"write {path}"):
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._fd, size)

    def append(self, lines: Iterable[bytes]) -> None:
        """Add lines; after an error the file is as it was."""
        data = b"".join(lines)
        left = memoryview(data)
        with disk_errors(f"write {self._path}"):
            try:
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError:
                os.ftruncate(self._fd, self.bytes)
                raise
        self.bytes += len(data)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines."""
        yield from (row for row, _ in _rows(self._path))

    def close(self) -> None:
        """Sync and close the file."""
        with disk_errors(f"write {self._path}"):
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)


def _continued(path: Path) -> tuple[_Lines, int, int]:
    """The file without a torn end and without what was never sent; its answers and its failures."""
    size = answers = failures = 0
    for row, end in _rows(path):
        error = row.get("error")
        if error is not None and error["code"] in _NEVER_SENT:
            break  # written at the end, which is made again
        answers, failures = answers + (error is None), failures + (error is not None)
        size = end
    return _Lines(path, size), answers, failures


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a file, each with the offset behind it."""
    end = 0
    with disk_errors(f"read {path}"), path.open("rb") as file:
        for line in file:
            try:
                row = orjson.loads(line) if line.endswith(b"\n") else None
            except orjson.JSONDecodeError:  # a page that a loss of power has left empty
                return
            if row is None:
                return
            end += len(line)
            yield row, end


def _digest(custom_id: str) -> bytes:
    return blake2b(custom_id.encode(), digest_size=16).digest()
