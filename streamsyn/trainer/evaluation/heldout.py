"""Losses on samples that are not trained on: held-out samples with and without contexts, and control data.

Without its contexts, a held-out sample is its instruction alone. The difference of the losses is what the
model gains by reading; a model that answers from memory gains nothing. Control data is short chat data, whose
loss shows what the model forgets while it learns to read long contexts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any, Protocol

import structlog
import torch

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import BadRow, Dropped, Example, HeldOut, Key, PackedRow, row_is_held_out
from streamsyn.trainer.model.head import target_losses
from streamsyn.trainer.model.loss import example_sums, make_batch
from streamsyn.trainer.model.sequence_parallel import SequenceGroup
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.stream.stream_reader import HELD_OUT, Rendering, row_digest

log = structlog.get_logger()

WITH, WITHOUT, CONTROL = "with_context", "without_context", "control"
Rows = tuple[PackedRow, ...]
"""The rows of one rank, or of one group of ranks that share each row."""
Losses = Mapping[Key, float]
"""For each sample, its mean loss per target in nats."""
_BATCH = 64
_LOGGED = 5
"""Dropped rows that are logged one by one; the rest is counted."""


class HoldsOut(Protocol):
    """Something that holds samples out of the stream."""

    @property
    def held_out(self) -> Sequence[HeldOut]:
        """The samples held out so far, in the order of the stream."""
        ...


class HeldOutSet:
    """The held-out samples as rows for an evaluation, with contexts and without.

    A sample without an `instruction` field is only measured with contexts.

    Args:
        planner: Holds samples out.
        renderer: Renders samples without contexts.
        seq_len: Maximum tokens per row.
        world: Number of ranks.
    """

    def __init__(self, planner: HoldsOut, renderer: Rendering, seq_len: int, world: int) -> None:
        self._planner = planner
        self._renderer = renderer
        self._seq_len = seq_len
        self._world = world
        self._bare: dict[Key, Example | None] = {}

    def rows(self) -> dict[str, list[Rows]]:
        """The rows of each rank, by `WITH` and `WITHOUT`; empty while no sample is held out."""
        held = self._planner.held_out
        if not held:
            return {}
        self._add_bare([one for one in held if one.example.key not in self._bare])
        self._bare = {one.example.key: self._bare[one.example.key] for one in held}
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


def control_examples(path: str, samples: int, renderer: Rendering, holdout: float = 0.0) -> list[Example]:
    """Read the first `samples` examples of the rows in `path`.

    Unusable rows are counted and logged, and so are those of held-out seeds, which are measured already.

    Args:
        path: `train.control`.
        samples: Maximum number of examples.
        renderer: Turns rows into examples.
        holdout: `train.holdout`.

    Raises:
        ConfigError: No row is usable, or `path` cannot be read.
    """
    found: list[Example] = []
    dropped: Counter[str] = Counter()
    for where, made in _made(path, holdout, renderer):
        if len(found) == samples:
            break
        if isinstance(made, Example):
            found.append(made)
            continue
        dropped[made.reason] += 1
        if dropped.total() <= _LOGGED:
            log.warning("control.dropped", at=where, reason=made.reason, why=made.detail)
    if dropped:
        log.warning("control.dropped_rows", count=dropped.total(), samples=len(found))
    if not found:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "it is empty"
        raise ConfigError(f"train.control: {path}: no row can be evaluated ({why})")
    return found


def row_tokens(section: TrainSection) -> int:
    """Maximum tokens of a row of several samples; 0 if each sample gets a row of its own."""
    return 0 if section.packing == "none" else section.seq_len


def deal_rows(examples: Iterable[Example], seq_len: int, world: int) -> list[Rows]:
    """Pack whole examples into rows, and deal these to ranks. All get equally many; some may be empty."""
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        if not rows or example.length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(example)
        room -= example.length
    rows += [[] for _ in range(-len(rows) % world)]
    return [tuple(tuple(row) for row in rows[rank::world]) for rank in range(world)]


@torch.no_grad()
def measure(model: torch.nn.Module, rows: Rows, device: torch.device, sequence: SequenceGroup) -> list[float]:
    """The mean loss per target, in nats, of each sample of `rows` in order; the same in all of a group."""
    means: list[float] = []
    model.eval()
    try:
        for row in rows:
            batch = sequence.share(make_batch(row, [1.0] * len(row), device))
            losses = target_losses(model, batch)
            summed, targets = sequence.sum(example_sums(losses, batch.owner, len(row)))
            means += (summed / targets).tolist()
    finally:
        model.train()
    return means


def summary(losses: Mapping[str, Losses]) -> dict[str, float]:
    """The fields of an evaluation: mean losses over samples, the context gain, the number held out."""
    means = {kind: fmean(of_kind.values()) for kind, of_kind in losses.items() if of_kind}
    found = {f"nll_{kind}": mean for kind, mean in means.items()}
    with_context, without = losses.get(WITH, {}), losses.get(WITHOUT, {})
    if both := with_context.keys() & without.keys():
        found["context_gain"] = fmean(without[key] - with_context[key] for key in both)
    if WITH in losses:
        found["held_out"] = len(losses[WITH])
    return found


class Changes:
    """The change of losses since the first evaluation, while the set of samples grows.

    New samples may be harder, so that the mean over all would jump. Each evaluation is compared with the one
    before over the samples of both, and these changes are added up, as in a chained index. Without new
    samples it is the difference of the means.

    Args:
        state: An earlier return value of `state`.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._before: dict[str, dict[Key, float]] = {
            kind: {Key(*key): loss for key, loss in losses}
            for kind, losses in state.get("before", {}).items()
        }
        self._changes: dict[str, float] = dict(state.get("changes", {}))

    def state(self) -> dict[str, Any]:
        """The state to resume from, as JSON values."""
        before = {kind: [[list(key), loss] for key, loss in of.items()] for kind, of in self._before.items()}
        return {"before": before, "changes": dict(self._changes)}

    def update(self, losses: Mapping[str, Losses]) -> dict[str, float]:
        """Add an evaluation, and return the change of each kind since the first: negative is better."""
        for kind, now in losses.items():
            before = self._before.get(kind, {})
            both = now.keys() & before.keys()
            change = fmean(now[key] - before[key] for key in both) if both else 0.0
            self._changes[kind] = self._changes.get(kind, 0.0) + change
            self._before[kind] = dict(now)
        return {f"nll_{kind}_change": self._changes[kind] for kind in losses}


def _without_contexts(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row with its instruction as the only user message; None if it has no instruction."""
    instruction = row.get("instruction")
    if not instruction or not isinstance(instruction, str):
        return None
    answer = next(one for one in reversed(row["messages"]) if one["role"] == "assistant")
    return {**row, "messages": [{"role": "user", "content": instruction}, answer]}


def _made(path: str, holdout: float, renderer: Rendering) -> Iterator[tuple[str, Example | Dropped]]:
    rows = enumerate(FileRows(path, "control", "train.control", count=False).placed())
    while some := list(islice(rows, _BATCH)):
        good = [(row, _key(seq, row)) for seq, (_, row) in some if not isinstance(row, BadRow)]
        made = iter(renderer.render_batch(good))
        for _, (where, row) in some:
            if isinstance(row, BadRow):
                yield where, Dropped("bad_row", row.problem)
                continue
            one = next(made)
            yield where, Dropped("held_out", HELD_OUT) if row_is_held_out(row, holdout) else one


def _key(seq: int, row: dict[str, Any]) -> Key:
    """The row's content is part of the key, so that a changed file is not compared with the earlier one."""
    return Key(f"control:{row_digest(row)}", 0, seq)
