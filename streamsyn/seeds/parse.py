"""Parses a line or a row into a Seed, or into a BadSeed with the reason and the detail of what is wrong."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from streamsyn.config.data_paths import is_url
from streamsyn.config.sections import FieldsSection, SeedFormat
from streamsyn.io.content import encoding_hint
from streamsyn.io.json_rows import decode_row, storable_fields, text_of
from streamsyn.io.rows import Line, TableRow
from streamsyn.records import ANSWERS, BadSeed, Entry, RejectReason, Seed, digest
from streamsyn.seeds.forms import FormsSeen, NotASeed, PairReader, is_absent, text_in

_PREVIEW_BYTES: Final = 120
"""The beginning of a bad line that its detail quotes."""
_INPUT: Final = frozenset(("input",))
"""A field that stays in the metadata though it is a part of the question: a template may use it by itself."""


class SeedParser:
    """Parses rows by their form and the field names of `seeds.fields`.

    Args:
        fields: The names.
        form: `seeds.format`.
        takes_documents: Whether a seed is a document; an instruction or answer beside it is metadata then.
        seen: Counts the forms of rows.
    """

    def __init__(
        self,
        fields: FieldsSection,
        *,
        form: SeedFormat = "auto",
        takes_documents: bool = False,
        seen: FormsSeen | None = None,
    ) -> None:
        self._fields = fields
        self._pairs = PairReader(fields, form)
        self._takes_documents = takes_documents
        self._seen = seen

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
            row, is_plain = decode_row(line.text)
        except orjson.JSONDecodeError as error:
            return _bad(origin, *_json_problem(line.text, error), line.text)
        if not isinstance(row, dict):
            detail = f"not a JSON object but {type(row).__name__}: {_preview(line.text)}"
            return _bad(origin, RejectReason.NOT_A_SEED, detail, line.text)
        return self.row(row, origin, task, line.text, is_plain=is_plain)

    def table_row(self, row: TableRow, origin: str, task: str) -> Entry:
        """The seed in a row of a table, whose place is `origin`."""
        if row.error is not None:
            return _bad(origin, RejectReason.NOT_A_SEED, f"the row cannot be read: {row.error}", b"row")
        return self.row(row.value, origin, task, b"row", row.unreadable)

    def row(
        self,
        row: Mapping[str, Any],
        origin: str,
        task: str,
        raw: bytes,
        unreadable: Mapping[str, Exception] | None = None,
        *,
        is_plain: bool = False,
    ) -> Entry:
        """The seed in a decoded row.

        Args:
            row: The fields by name.
            origin: Its place.
            task: The task if the row names none.
            raw: Hashed into the key of a bad row.
            unreadable: Fields with a value that Python cannot hold; `row` has them as text.
            is_plain: Whether all values can be written as JSON as they are.
        """
        try:
            seed, taken = self._seed(row, origin, task, is_plain=is_plain)
        except NotASeed as error:
            return _bad(origin, RejectReason.NOT_A_SEED, str(error), raw)
        if not is_plain:
            texts = (seed.instruction, seed.answer, seed.context, seed.id, seed.task)
            if any(text_of(text) != text for text in texts):
                detail = "it holds a lone surrogate, which is not text"
                return _bad(origin, RejectReason.INVALID_JSON, detail, raw)
            for name, problem in (unreadable or {}).items():
                if name in taken:
                    return _unreadable(problem, origin)
        return seed

    def _seed(
        self, row: Mapping[str, Any], origin: str, task: str, *, is_plain: bool
    ) -> tuple[Seed, frozenset[str]]:
        """The seed, and the fields that it was made of."""
        fields, rest = self._fields, dict(row)
        answers: Sequence[str] = ()
        kept: frozenset[str] = frozenset()
        given_id: str | None = None
        if self._takes_documents:
            taken, instruction, answer = frozenset((fields.context,)), "", ""
            context = _document(row, fields.context)
            identity: tuple[str, ...] = (context,)
        else:
            pair = self._pairs.pair(row)
            taken, instruction, answers, context = pair.taken, pair.instruction, pair.answers, ""
            answer, identity, given_id = answers[0], pair.identity, pair.id
            if pair.form == "alpaca":
                kept = _INPUT
            if self._seen is not None:
                self._seen.note(pair)
            for name in (fields.instruction, fields.answer, fields.messages):
                if name in rest and rest[name] is None:
                    del rest[name]
        for name in taken - kept:
            rest.pop(name, None)
        own_id, own_task = _label(row, fields.id), _label(row, fields.task)
        for name, own in ((fields.id, own_id), (fields.task, own_task)):
            if own is not None or is_absent(row, name):
                rest.pop(name, None)
        metadata = rest if is_plain else storable_fields(rest)
        if len(answers) > 1:
            metadata[ANSWERS] = list(answers)
        own_id = given_id or own_id
        if own_id is None:
            own_id = digest(*(identity if is_plain else map(text_of, identity))).hex()
        return Seed(own_id, own_task or task, instruction, answer, origin, metadata, context), taken


def _label(row: Mapping[str, Any], name: str) -> str | None:
    """An id or a task: a text or a number; None for anything else, which stays a field like others."""
    value = row.get(name)
    if isinstance(value, str):
        return None if value in {"", "NaN"} else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return str(value)


def _document(row: Mapping[str, Any], name: str) -> str:
    if not is_absent(row, name):
        return text_in(row, name)
    if row.get(name) is not None:
        raise NotASeed(f"field {name!r} is empty")
    names = ", ".join(sorted(map(str, row))[:8]) or "none"
    advice = "set seeds.fields.context to the field with the document"
    raise NotASeed(f"field {name!r} is missing; fields: {names}; {advice}")


def _unreadable(error: Exception, origin: str) -> Entry:
    utf8 = isinstance(error, UnicodeDecodeError)
    reason = RejectReason.INVALID_UTF8 if utf8 else RejectReason.NOT_A_SEED
    return _bad(origin, reason, f"the row cannot be read: {error}", b"row")


def _json_problem(text: bytes, error: orjson.JSONDecodeError) -> tuple[RejectReason, str]:
    try:
        text.decode()
    except UnicodeDecodeError as encoding:
        where = f"invalid UTF-8 at byte {encoding.start}: {_preview(text)}"
        return RejectReason.INVALID_UTF8, where + encoding_hint(text)
    return RejectReason.INVALID_JSON, f"{error.msg} at column {error.colno}: {_preview(text)}"


def _bad(origin: str, reason: RejectReason, detail: str, raw: bytes) -> BadSeed:
    # The key of a file's line has the absolute path in it; a pipe and a URL have none.
    place = origin if origin.startswith("-:") or is_url(origin) else str(Path(origin).absolute())
    return BadSeed(origin, reason, detail, digest("bad", os.fsencode(place), raw))


def _preview(text: bytes) -> str:
    start = text[:_PREVIEW_BYTES].decode(errors="replace")
    return repr(start) + ("..." if len(text) > _PREVIEW_BYTES else "")
