"""From a line or a row to a Seed; whatever is wrong with it becomes a BadSeed that says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from streamsyn.config.sections import FieldsSection
from streamsyn.io.lines import Line
from streamsyn.records import BadSeed, Entry, RejectReason, Seed, digest

_SHOWN = 120
"""Characters of a bad line that its detail shows."""
_WRAPPING = 16
"""Levels of nesting that are kept free for what a log puts around a seed's other fields."""


class SeedParser:
    """Reads seeds in the form that `seeds.fields` names.

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
        """The seed in one JSON line; None for a blank one."""
        origin = f"{source}:{line.number}"
        if line.text is None:
            detail = f"{line.size} bytes, more than seeds.max_line_bytes = {max_line_bytes}"
            return _bad(origin, RejectReason.LINE_TOO_LONG, detail, str(line.size).encode())
        if not line.text or line.text.isspace():
            return None
        try:
            row = orjson.loads(line.text)
        except orjson.JSONDecodeError as error:
            return _bad(origin, *_why_no_json(line.text, error), line.text)
        if not isinstance(row, dict):
            detail = f"a JSON object is wanted, not {type(row).__name__}: {_shown(line.text)}"
            return _bad(origin, RejectReason.NOT_A_SEED, detail, line.text)
        return self.row(row, origin, task, line.text)

    def row(self, row: Mapping[str, Any], origin: str, task: str, raw: bytes) -> Entry:
        """The seed in a decoded object; `raw` stands for its bytes."""
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
        """What a row is whose values Python cannot hold."""
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
            # What travels along is written again later: what cannot be written is refused here.
            wrapped: Any = rest
            for _ in range(_WRAPPING):
                wrapped = [wrapped]
            encoded = orjson.dumps(wrapped, default=str)
        except (TypeError, ValueError) as error:  # orjson's own error is a TypeError
            raise _NotASeed(f"its other fields cannot be written as JSON: {error}") from error
        decoded: dict[str, Any] = orjson.loads(encoded[_WRAPPING:-_WRAPPING])
        return decoded


class _NotASeed(Exception):
    """Raised when a row lacks what a seed needs."""


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise _NotASeed(f"field {name!r} is missing; there are {_names(row)}")
    if not isinstance(value, str):
        raise _NotASeed(f"field {name!r} is no string but {type(value).__name__}")
    if not value.strip():
        raise _NotASeed(f"field {name!r} is empty")
    return value


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _NotASeed(f"field {name!r} is no string or whole number but {type(value).__name__}")
    return str(value)


def _chat_pair(messages: Any, name: str) -> tuple[str, str]:
    """Instruction and answer of a single-turn chat; a system message before them is left aside."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _NotASeed(f"field {name!r} is no list of messages")
    turns = [message for message in messages if message.get("role") != "system"]
    if [message.get("role") for message in turns] != ["user", "assistant"]:
        roles = ", ".join(str(message.get("role")) for message in messages) or "none"
        raise _NotASeed(f"field {name!r} is no pair of user and assistant (roles: {roles})")
    return _text(turns[0], "content"), _text(turns[1], "content")


def _why_no_json(text: bytes, error: orjson.JSONDecodeError) -> tuple[RejectReason, str]:
    try:
        text.decode()
    except UnicodeDecodeError as encoding:
        return RejectReason.INVALID_UTF8, f"invalid UTF-8 at byte {encoding.start}: {_shown(text)}"
    return RejectReason.INVALID_JSON, f"{error.msg} at column {error.colno}: {_shown(text)}"


def _bad(origin: str, reason: RejectReason, detail: str, raw: bytes) -> BadSeed:
    # A pipe lies nowhere: a line of it is known again from whatever directory it is piped.
    place = origin if origin.startswith("-:") else str(Path(origin).absolute())
    return BadSeed(origin, reason, detail, digest("bad", place, raw))


def _shown(text: bytes) -> str:
    start = text[:_SHOWN].decode(errors="replace")
    return repr(start) + ("..." if len(text) > _SHOWN else "")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "none"
