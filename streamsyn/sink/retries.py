"""Which rejects hold: a retry asks some again, and an outcome that comes of it supersedes its reject.

A row of contexts or rejects with `supersedes` names the reject, by `seq`, that no longer holds. Whoever
counts or shows rejects leaves out those in `superseded`. Retries are lines of the manifest; until the next
final line, the rejects that they reopen and that still hold are `open_rejects`.
"""

from collections.abc import Iterator
from typing import Any

from streamsyn.sink.snapshot import Part, Snapshot

Row = dict[str, Any]


class SeqSet:
    """A set of row numbers, one bit each up to the greatest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._size = 0

    def add(self, seq: int) -> None:
        """Add a number; one that is in the set already changes nothing."""
        if seq in self:
            return
        self._bits.extend(bytes(max(0, seq // 8 + 1 - len(self._bits))))
        self._bits[seq // 8] |= 1 << seq % 8
        self._size += 1

    def __contains__(self, seq: object) -> bool:
        if not isinstance(seq, int):
            return False
        return 0 <= seq // 8 < len(self._bits) and bool(self._bits[seq // 8] & 1 << seq % 8)

    def __len__(self) -> int:
        return self._size


def superseded(snapshot: Snapshot) -> SeqSet:
    """The rejects that no longer hold, by `seq`. Reads the outcomes since the first retry."""
    found = SeqSet()
    retries = snapshot.manifest.retries
    if retries:
        for kind, first in (("contexts", retries[0].contexts), ("rejects", retries[0].rejects)):
            for part in snapshot.parts[kind]:
                for row in _rows_from(part, first):
                    if (seq := superseded_by(row)) is not None:
                        found.add(seq)
    return found


def superseded_by(row: Row) -> int | None:
    """The `seq` of the reject that a row of contexts or rejects supersedes; None where it supersedes none."""
    seq = row.get("supersedes")
    return seq if isinstance(seq, int) and seq >= 0 else None


def open_rejects(snapshot: Snapshot, gone: SeqSet) -> Iterator[Row]:
    """The rows of rejects that retries reopened and that still hold; `gone` are the superseded ones."""
    retries = snapshot.manifest.open_retries
    for part in snapshot.parts["rejects"] if retries else ():
        for row in part.rows():
            if row["seq"] not in gone and any(retry.reopens(row) for retry in retries):
                yield row


def holding_rejects(snapshot: Snapshot) -> Iterator[Row]:
    """The rows of rejects that hold."""
    gone = superseded(snapshot)
    for part in snapshot.parts["rejects"]:
        for row in part.rows():
            if row.get("seq") not in gone:
                yield row


def _rows_from(part: Part, first_seq: int) -> Iterator[Row]:
    if part.sealed is None or part.sealed.last_seq >= first_seq:
        yield from part.rows()
