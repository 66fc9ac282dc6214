"""Held-out samples as they are, and as their instruction alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from streamsyn.errors import SinkError
from streamsyn.sink import frames
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.runlog import shard_paths
from streamsyn.trainer.evaluation.losses import WITH, WITHOUT, Rows, deal_rows
from streamsyn.trainer.stream.examples import Example, Key
from streamsyn.trainer.stream.feed import Rendering
from streamsyn.trainer.stream.holdout import HeldOut


class HoldingOut(Protocol):
    """Who knows what is held out."""

    @property
    def held_out(self) -> Sequence[HeldOut]:
        """What is held out so far, in the order of the stream."""
        ...


class HeldOutSet:
    """The rows that an evaluation measures.

    A sample does not say what its instruction is. It stands in the run directory that the sample is from,
    or in the sample's row, if somebody put it there; elsewhere only the loss with contexts is measured.

    Args:
        planner: Holds samples out.
        renderer: Makes examples.
        run: The run directory that is followed; None for another source.
        seq_len: Tokens of a row at most.
        world: Ranks to deal rows to.
    """

    def __init__(
        self, planner: HoldingOut, renderer: Rendering, run: Path | None, seq_len: int, world: int
    ) -> None:
        self._planner = planner
        self._renderer = renderer
        self._run = run
        self._seq_len = seq_len
        self._world = world
        self._bare: dict[Key, Example | None] = {}

    def rows(self) -> dict[str, list[Rows]]:
        """Rows for each rank, by whether they hold contexts; nothing when nothing is held out so far."""
        held = list(self._planner.held_out)
        if not held:
            return {}
        self._add_bare([one for one in held if one.example.key not in self._bare])
        bare = [example for one in held if (example := self._bare[one.example.key]) is not None]
        dealt = {WITH: self._deal(one.example for one in held)}
        if bare:
            dealt[WITHOUT] = self._deal(bare)
        return dealt

    def _deal(self, examples: Iterable[Example]) -> list[Rows]:
        return deal_rows(examples, self._seq_len, self._world)

    def _add_bare(self, new: Sequence[HeldOut]) -> None:
        instructions = self._instructions([one.row for one in new])
        for one, instruction in zip(new, instructions, strict=True):
            self._bare[one.example.key] = None
            if instruction is None:
                continue
            answer = next(said for said in reversed(one.row["messages"]) if said["role"] == "assistant")
            bare = {**one.row, "messages": [{"role": "user", "content": instruction}, answer]}
            made = self._renderer.render_batch([(bare, one.example.key)])[0]
            self._bare[one.example.key] = made if isinstance(made, Example) else None

    def _instructions(self, rows: Sequence[dict[str, Any]]) -> list[str | None]:
        wanted = {seq for row in rows if (seq := _relevant_seq(row)) is not None}
        found = find_instructions(self._run, wanted) if self._run is not None and wanted else {}
        return [row.get("instruction") or found.get(_relevant_seq(row)) for row in rows]


def find_instructions(run: Path, seqs: set[int]) -> dict[int | None, str]:
    """The instructions of contexts in a run directory, by their numbers. Reads the shards that hold them.

    Raises:
        SinkError: They cannot be read.
    """
    try:
        try:
            return _find(run, seqs)
        except FileNotFoundError:  # the run has sealed the open shard meanwhile
            return _find(run, seqs)
    except OSError as error:
        raise SinkError(f"cannot read {error.filename or run}: {error.strerror}") from error


def _find(run: Path, seqs: set[int]) -> dict[int | None, str]:
    manifest = Manifest(run / "manifest.jsonl")
    ends = {run / shard.path: (shard.first_seq, shard.last_seq) for shard in manifest.of_kind("contexts")}
    found: dict[int | None, str] = {}
    for path in shard_paths(run, manifest, "contexts"):
        first, last = ends.get(path, (0, max(seqs)))
        if any(first <= seq <= last for seq in seqs - found.keys()):
            for row in frames.rows(path):
                if row["seq"] in seqs:
                    found[row["seq"]] = row["instruction"]
    return found


def _relevant_seq(row: dict[str, Any]) -> int | None:
    try:
        return int(row["context_seqs"][row["relevant_index"]])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
