"""Held-out samples as they are, and as their instruction alone."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

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

    Of a row that does not say what its instruction is, only the loss with contexts is measured.

    Args:
        planner: Holds samples out.
        renderer: Makes examples.
        seq_len: Tokens of a row at most.
        world: Ranks to deal rows to.
    """

    def __init__(self, planner: HoldingOut, renderer: Rendering, seq_len: int, world: int) -> None:
        self._planner = planner
        self._renderer = renderer
        self._seq_len = seq_len
        self._world = world
        self._bare: dict[Key, Example | None] = {}

    def rows(self) -> dict[str, list[Rows]]:
        """Rows for each rank, by whether they hold contexts; nothing when nothing is held out so far."""
        held = self._planner.held_out
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
        for one in new:
            bare = _without_contexts(one.row)
            made = None if bare is None else self._renderer.render_batch([(bare, one.example.key)])[0]
            self._bare[one.example.key] = made if isinstance(made, Example) else None


def _without_contexts(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row with its instruction as all that is asked; None when it does not say what that is."""
    instruction = row.get("instruction")
    if not instruction or not isinstance(instruction, str):
        return None
    answer = next(said for said in reversed(row["messages"]) if said["role"] == "assistant")
    return {**row, "messages": [{"role": "user", "content": instruction}, answer]}
