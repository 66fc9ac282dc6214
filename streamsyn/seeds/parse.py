"""Parses a line or a row into a Seed, or into a BadSeed with the reason and the detail of what is wrong."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from streamsyn.config.sections import FieldsSection
from streamsyn.io.lines import Line
from streamsyn.records import BadSeed, Entry, RejectReason, Seed, digest

_PREVIEW_BYTES: Final = 120
"""The beginning of a bad line that its detail quotes."""
_WRAPPING: Final = 16
"""Levels of nesting that the log may put around a seed's metadata: JSON's nesting is limited."""


class SeedParser:
    """Parses rows by the field names of `seeds.fields`.

    Args:
        fields: The names.
        takes_documents: Whether a seed is a document; an instruction or answer beside it is metadata then.
    """

    def __init__(self, fields: FieldsSection, *, takes_documents: bool = False) -> None:
        self._fields = fields
        self._takes_documents = takes_documents
        parts = (fields.context,) if takes_documents else (fields.instruction, fields.answer)
        self._named = frozenset((*parts, fields.id, fields.task))

    def line(self, line: Line, source: str, task: str, max_line_bytes: int) -> Entry | None:
        """The seed in one JSON line; None for a blank line.

        Args:
            line: The line.
            source: The file, or `-`, for messages.
            task: The task if the line names none.
            max_line_bytes: The limit, for the message of a line above it.
        """
        origin = f"{source}:{line.number}"
        if line.text is None:
            detail = f"{line.size} bytes, more than seeds.max_line_bytes = {max_line_bytes}"
            return _bad(origin, RejectReason.LINE_TOO_LONG, detail, str(line.size).encode())
        if not line.text or line.text.isspace():
            return None
        try:
            row = orjson.loads(line.text)
        except orjson.JSONDecodeError as error:
            return _bad(origin, *_json_problem(line.text, error), line.text)
        if not isinstance(row, dict):
            detail = f"not a JSON object but {type(row).__name__}: {_preview(line.text)}"
            return _bad(origin, RejectReason.NOT_A_SEED, detail, line.text)
        return self.row(row, origin, task, line.text)

    def row(self, row: Mapping[str, Any], origin: str, task: str, raw: bytes) -> Entry:
        """The seed in a decoded row, whose place is `origin`; `raw` is hashed into the key of a bad one."""
        try:
            if self._takes_documents:
                instruction, answer, context = "", "", _text(row, self._fields.context)
            else:
                instruction, answer, context = *self._pair(row), ""
            task = _optional(row, self._fields.task) or task
            parts = (context,) if self._takes_documents else (instruction, answer)
            seed_id = _optional(row, self._fields.id) or digest(*parts).hex()
            metadata = self._rest(row)
        except _NotASeed as error:
            return _bad(origin, RejectReason.NOT_A_SEED, str(error), raw)
        return Seed(seed_id, task, instruction, answer, origin, metadata, context)

    def unreadable(self, error: Exception, origin: str) -> Entry:
        """The BadSeed for a row with a value that Python cannot hold."""
        utf8 = isinstance(error, UnicodeDecodeError)
        reason = RejectReason.INVALID_UTF8 if utf8 else RejectReason.NOT_A_SEED
        return _bad(origin, reason, f"the row cannot be read: {error}", b"row")

    def _pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        fields = self._fields
        if fields.instruction not in row and fields.answer not in row and fields.messages in row:
            return _chat_pair(row[fields.messages], fields.messages)
        return _text(row, fields.instruction), _text(row, fields.answer)

    def _rest(self, row: Mapping[str, Any]) -> dict[str, Any]:
        taken = self._named
        if not self._takes_documents and self._fields.instruction not in row:
            taken = taken | {self._fields.messages}
        rest = {key: value for key, value in row.items() if key not in taken}
        if not rest:
            return rest
        try:
            # Metadata is written to the log later: what cannot be written is refused here.
            wrapped: Any = rest
            for _ in range(_WRAPPING):
                wrapped = [wrapped]
            encoded = orjson.dumps(wrapped, default=str)
        except (TypeError, ValueError) as error:  # orjson.JSONEncodeError is a TypeError
            raise _NotASeed(f"the other fields cannot be written as JSON: {error}") from error
        decoded: dict[str, Any] = orjson.loads(encoded[_WRAPPING:-_WRAPPING])
        return decoded


class _NotASeed(Exception):
    """Raised when a row is not a valid seed; its text says why."""


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise _NotASeed(f"field {name!r} is missing; fields: {_names(row)}")
    if not isinstance(value, str):
        raise _NotASeed(f"field {name!r} is not a string but {type(value).__name__}")
    if not value.strip():
        raise _NotASeed(f"field {name!r} is empty")
    return value


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _NotASeed(f"field {name!r} is not a string or an integer but {type(value).__name__}")
    return str(value)


def _chat_pair(messages: Any, name: str) -> tuple[str, str]:
    """The instruction and the answer of a single-turn chat; system messages are ignored."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _NotASeed(f"field {name!r} is not a list of messages")
    turns = [message for message in messages if message.get("role") != "system"]
    if [message.get("role") for message in turns] != ["user", "assistant"]:
        roles = ", ".join(str(message.get("role")) for message in messages) or "none"
        raise _NotASeed(f"field {name!r} is not one user message and one assistant message (roles: {roles})")
    return _text(turns[0], "content"), _text(turns[1], "content")


def _json_problem(text: bytes, error: orjson.JSONDecodeError) -> tuple[RejectReason, str]:
    try:
        text.decode()
    except UnicodeDecodeError as encoding:
        return RejectReason.INVALID_UTF8, f"invalid UTF-8 at byte {encoding.start}: {_preview(text)}"
    return RejectReason.INVALID_JSON, f"{error.msg} at column {error.colno}: {_preview(text)}"


def _bad(origin: str, reason: RejectReason, detail: str, raw: bytes) -> BadSeed:
    # The key of a file's line has the absolute path in it; a pipe has none.
    place = origin if origin.startswith("-:") else str(Path(origin).absolute())
    return BadSeed(origin, reason, detail, digest("bad", os.fsencode(place), raw))


def _preview(text: bytes) -> str:
    start = text[:_PREVIEW_BYTES].decode(errors="replace")
    return repr(start) + ("..." if len(text) > _PREVIEW_BYTES else "")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "none"
