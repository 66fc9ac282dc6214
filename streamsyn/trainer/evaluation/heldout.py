"""The loss on samples that are kept out of training, with their contexts and without; and on short chat data.

Without its contexts, a sample is its instruction alone. The difference is what the model gains by reading;
a model that answers from memory gains nothing. The short chat data shows what it forgets meanwhile.

Short chat data whose loss shows what a model forgets while it learns to read long contexts.

Held-out samples as they are, and as their instruction alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any, Protocol

import structlog
import torch

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Dropped, Example, HeldOut, Key, Row
from streamsyn.trainer.model.batch import make_batch
from streamsyn.trainer.model.loss import example_means, token_losses
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.stream.stream_reader import Rendering, row_digest

log = structlog.get_logger()

WITH, WITHOUT, CONTROL = "with_context", "without_context", "control"
Rows = tuple[tuple[Example, ...], ...]


def deal_rows(examples: Iterable[Example], seq_len: int, world: int) -> list[Rows]:
    """Rows of whole examples for each rank, as many for each; the last ones may be empty."""
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
def measure(model: torch.nn.Module, rows: Rows, device: torch.device) -> list[float]:
    """The mean loss of a target, in nats, of each sample of `rows`, one row after the other."""
    means: list[float] = []
    model.eval()
    try:
        for row in rows:
            batch = make_batch(row, [1.0] * len(row), device)
            losses = token_losses(model(**batch.forward_arguments()).logits, batch.labels)
            means += example_means(losses, batch.owner, len(row)).tolist()
    finally:
        model.train()
    return means


Losses = Mapping[Key, float]
"""The mean loss of a target of each sample."""


def summary(losses: Mapping[str, Losses]) -> dict[str, float]:
    """Mean loss of a target in nats, a sample weighing the same as any other, of each kind; and the gain."""
    means = {kind: fmean(of_kind.values()) for kind, of_kind in losses.items() if of_kind}
    found = {f"nll_{kind}": mean for kind, mean in means.items()}
    with_context, without = losses.get(WITH, {}), losses.get(WITHOUT, {})
    if both := with_context.keys() & without.keys():
        found["context_gain"] = fmean(without[key] - with_context[key] for key in both)
    if WITH in losses:
        found["held_out"] = len(losses[WITH])
    return found


class Changes:
    """How losses have changed since the first evaluation, while samples join those that are measured.

    What joins may be harder, so that the mean of all would jump. An evaluation is compared with the one
    before over the samples of both, and these changes are added up: a chained index. As long as none join it
    is the difference of the means.

    Args:
        state: What `state` gave before.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._before: dict[str, dict[Key, float]] = {
            kind: {Key(*key): loss for key, loss in losses}
            for kind, losses in state.get("before", {}).items()
        }
        self._changes: dict[str, float] = dict(state.get("changes", {}))

    def state(self) -> dict[str, Any]:
        """What a later run goes on from; can be written as JSON."""
        before = {kind: [[list(key), loss] for key, loss in of.items()] for kind, of in self._before.items()}
        return {"before": before, "changes": dict(self._changes)}

    def take(self, losses: Mapping[str, Losses]) -> dict[str, float]:
        """The change of each kind up to this evaluation: negative is better."""
        for kind, now in losses.items():
            before = self._before.get(kind, {})
            both = now.keys() & before.keys()
            change = fmean(now[key] - before[key] for key in both) if both else 0.0
            self._changes[kind] = self._changes.get(kind, 0.0) + change
            self._before[kind] = dict(now)
        return {f"nll_{kind}_change": self._changes[kind] for kind in losses}


_AT_ONCE = 64
_SHOWN = 5
"""Dropped rows that are logged one by one."""


def control_examples(path: str, samples: int, renderer: Rendering) -> list[Example]:
    """The first examples of the rows in `path`, so many at most. A row that makes none is counted and said.

    Raises:
        ConfigError: No row makes an example, or there is nothing to read.
    """
    found: list[Example] = []
    dropped: Counter[str] = Counter()
    for where, made in _made(path, renderer):
        if len(found) == samples:
            break
        if isinstance(made, Example):
            found.append(made)
            continue
        dropped[made.reason] += 1
        if dropped.total() <= _SHOWN:
            log.warning("control.dropped", at=where, reason=made.reason, why=made.detail)
    if dropped:
        log.warning("control.dropped_rows", count=dropped.total(), samples=len(found))
    if not found:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "it is empty"
        raise ConfigError(f"train.control: {path}: no row of it can be evaluated ({why})")
    return found


def _made(path: str, renderer: Rendering) -> Iterator[tuple[str, Example | Dropped]]:
    rows = FileRows(path, "control", "train.control", count=False).placed()
    while some := list(islice(rows, _AT_ONCE)):
        good = [(row.value, _key(row)) for _, row in some if row.value is not None]
        made = iter(renderer.render_batch(good))
        for where, row in some:
            yield where, Dropped("bad_row", row.problem) if row.value is None else next(made)


def _key(row: Row) -> Key:
    """By what it holds: another file is not compared with this one when a training goes on."""
    return Key(f"control:{row_digest(row)}", 0, row.seq)


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
