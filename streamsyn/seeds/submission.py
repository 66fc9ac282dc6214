"""One request that submits seeds: its lines are parsed, and its answer says what became of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any, Final, Protocol

import orjson

from streamsyn.errors import KeyReused
from streamsyn.io.rows import Line, LineSplitter
from streamsyn.records import BadSeed, Entry, RejectReason, digest
from streamsyn.seeds.inbox_lines import NAME, StoredAnswer
from streamsyn.seeds.parse import SeedParser

_PART_ENTRIES: Final = 4096
_PART_BYTES: Final = 2**20
_MAX_REFUSED: Final = 100
"""Refused lines that an answer describes; the others are counted."""


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line that is not a seed.

    Attributes:
        line: Its number in the request, counted from 1.
        detail: What is wrong with it.
    """

    line: int
    detail: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of the lines of a request. Blank lines are skipped.

    Attributes:
        accepted: Seeds that are on disk now and were not there before.
        duplicate: Seeds that had been submitted before.
        refused_total: Lines that are not seeds.
        refused: The first of these.
    """

    accepted: int = 0
    duplicate: int = 0
    refused_total: int = 0
    refused: list[RefusedLine] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "accepted": self.accepted,
            "duplicate": self.duplicate,
            "refused": self.refused_total,
            "refused_lines": [asdict(line) for line in self.refused],
        }

    @classmethod
    def from_json(cls, body: bytes) -> "Submitted":
        """The reverse of `as_json`."""
        found = orjson.loads(body)
        refused = [RefusedLine(**line) for line in found["refused_lines"]]
        return cls(found["accepted"], found["duplicate"], found["refused"], refused)


class _Append(Protocol):
    """Writes entries, and behind them the answer made from the number of new ones, which is returned."""

    def __call__(
        self, entries: Sequence[Entry], answer: Callable[[int], StoredAnswer] | None = None, /
    ) -> int: ...


class Submission:
    """Takes the lines of a request in pieces. Opened by `Inbox.submission`; for one thread at a time.

    A request whose key is known is only compared with the earlier one.

    Args:
        append: Writes entries and returns the number of new ones.
        parser: Parses lines.
        max_line_bytes: The longest line.
        key: The idempotency key of the request; None for none.
        known: The answer of an earlier request with this key.
        keeps_bad: Keep bad lines as entries instead of refusing them.
    """

    def __init__(
        self,
        append: _Append,
        parser: SeedParser,
        max_line_bytes: int,
        key: str | None,
        known: StoredAnswer | None,
        *,
        keeps_bad: bool = False,
    ) -> None:
        self._append = append
        self._parser = parser
        self._splitter = LineSplitter(max_line_bytes)
        self.max_line_bytes = max_line_bytes
        self._key = key
        self._known = known
        self._keeps_bad = keeps_bad
        self._hash = blake2b(digest_size=16)
        self._rows = 0
        self._entries: list[Entry] = []
        self._bytes = 0
        self.so_far = Submitted()
        """What became of the lines that are on disk or refused."""

    @property
    def is_answered(self) -> bool:
        """Whether an earlier request with its key was answered."""
        return self._known is not None

    @property
    def endless_line(self) -> int | None:
        """The number of the line whose end has not come yet, if it is too long already."""
        return self._splitter.endless_line

    def feed(self, chunk: bytes) -> None:
        """Take a piece of the body, which may end within a line.

        Raises:
            InboxClosed, SinkError: As `flush`.
        """
        self._note(chunk)
        if self._known is None:
            for line in self._splitter.feed(chunk):
                self._take(line)

    def add(self, row: object) -> None:
        """Take one row: a line of JSON as bytes or text, or a decoded one.

        Raises:
            InboxClosed, SinkError: As `flush`.
        """
        self._rows += 1
        if isinstance(row, str):
            row = row.encode("utf-8", "surrogatepass")
        raw = row if isinstance(row, bytes) else repr(row).encode("utf-8", "backslashreplace")
        self._note(raw + b"\n")
        if self._known is not None:
            return
        if isinstance(row, bytes):
            text = raw.rstrip(b"\r\n")
            is_short = len(text) <= self.max_line_bytes
            self._take(Line(self._rows, text if is_short else None, len(text)))
        elif isinstance(row, Mapping):
            self._keep(self._parser.row(row, f"{NAME}:{self._rows}", NAME, raw), self._rows, raw)
        else:
            detail = f"not a JSON object but {type(row).__name__}"
            self._keep(BadSeed("", RejectReason.NOT_A_SEED, detail, b""), self._rows, raw)

    def flush(self) -> None:
        """Return when all complete lines so far are on disk.

        Raises:
            InboxClosed: The inbox is closed.
            SinkError: They cannot be written.
        """
        if self._entries:
            self._write(None)

    def finish(self) -> Submitted:
        """The request is complete: its answer, when everything is on disk.

        Raises:
            InboxClosed, SinkError: As `flush`.
            KeyReused: Its key belongs to a request with a different content.
        """
        body = self._hash.digest()
        if self._known is not None:
            if self._known.body != body:
                raise KeyReused(
                    f"the idempotency key {self._key!r} belongs to a request with a different content; "
                    "use a new key for each request"
                )
            return Submitted.from_json(self._known.answer)
        for line in self._splitter.finish():
            self._take(line)
        if self._key is None:
            self.flush()
        else:
            self._write(self._key)
        return self.so_far

    def _note(self, data: bytes) -> None:
        if self._key is not None:
            self._hash.update(data)

    def _take(self, line: Line) -> None:
        entry = self._parser.line(line, NAME, NAME, self.max_line_bytes)
        if entry is not None:
            self._keep(entry, line.number, line.text or str(line.size).encode())

    def _keep(self, entry: Entry, number: int, raw: bytes) -> None:
        if isinstance(entry, BadSeed):
            if not self._keeps_bad:
                is_json = entry.reason is not RejectReason.INVALID_JSON
                self._refuse(number, entry.detail if is_json else f"not valid JSON: {entry.detail}")
                return
            entry = replace(entry, key=digest("bad", raw))  # whatever its number: it may come again
        self._entries.append(entry)
        self._bytes += len(raw)
        if len(self._entries) >= _PART_ENTRIES or self._bytes >= _PART_BYTES:
            self.flush()

    def _refuse(self, number: int, detail: str) -> None:
        so_far = self.so_far
        refused = so_far.refused
        if len(refused) < _MAX_REFUSED:
            refused = [*refused, RefusedLine(number, detail)]
        self.so_far = replace(so_far, refused_total=so_far.refused_total + 1, refused=refused)

    def _write(self, key: str | None) -> None:
        """Write the entries, and behind them the answer if the request ends here and has a key."""
        entries, self._entries, self._bytes = self._entries, [], 0
        so_far = self.so_far

        def total(accepted: int) -> Submitted:
            duplicate = so_far.duplicate + len(entries) - accepted
            return replace(so_far, accepted=so_far.accepted + accepted, duplicate=duplicate)

        def answer(accepted: int) -> StoredAnswer:
            assert key is not None, "asked for with a key only"
            return StoredAnswer(key, self._hash.digest(), orjson.dumps(total(accepted).as_json()))

        self.so_far = total(self._append(entries, answer if key is not None else None))
