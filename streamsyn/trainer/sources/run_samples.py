"""The samples of a run directory as a source, while the run goes on."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from streamsyn.following.run_rows import FolderWatch, RunRows
from streamsyn.following.shard_lines import Cursor
from streamsyn.trainer.examples import Row

_SPAN: Final = 64
"""`pick` reads this many neighbouring rows at once, wanted or not: each read decompresses a whole frame of
rows."""


class RunSamples:
    """Source: the samples that a run writes, as `RunRows` reads them. They end when the run has ended.

    A different run in the place of the first one is an error.

    Args:
        root: The run directory, which need not exist yet.
    """

    name = "run"

    def __init__(self, root: Path) -> None:
        self._samples = RunRows(root)
        self._watch = FolderWatch()

    def fetch(self, first: int, limit: int) -> list[Row]:
        self._watch.add(self._samples.folders)
        found: list[Row] = []
        while len(found) < limit:
            at = first + len(found)
            some = self._samples.rows(at, limit - len(found))
            if not some:
                break
            found += (Row(seq, row) for seq, row in enumerate(some, at))
        return found

    def total(self) -> int | None:
        self._watch.add(self._samples.folders)
        return self._samples.total()

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        cursor, at = Cursor(), 0
        while at < len(seqs):
            first = seqs[at]
            last = seqs[bisect_left(seqs, first + _SPAN) - 1]
            found = self._samples.rows(first, last + 1 - first, cursor=cursor)
            if not found:
                return
            end = bisect_left(seqs, first + len(found))
            for seq in seqs[at:end]:
                yield Row(seq, found[seq - first])
            at = end

    async def changed(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)

    def close(self) -> None:
        self._watch.close()
