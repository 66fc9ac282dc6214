"""What rank 0 decides: when to train, to evaluate, to save, to stop. One order for each rank at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import structlog

from streamsyn.sections import TrainSection
from streamsyn.trainer.control import WAIT_S, Evaluate, Order, Ranks, Save, Step, Stop, Wait
from streamsyn.trainer.evals import Rows
from streamsyn.trainer.examples import End, StepPlan
from streamsyn.trainer.figures import Figures
from streamsyn.trainer.loop import Progress
from streamsyn.trainer.loss import denominator, target_weights
from streamsyn.trainer.plans import PlanQueue
from streamsyn.trainer.schedule import Schedule
from streamsyn.trainer.store import Store

log = structlog.get_logger()

HeldOutRows = Callable[[], dict[str, list[Rows]] | None]
"""The rows to evaluate now, for each kind and rank; None when there are none."""


@dataclass(slots=True)
class Totals:
    """What was trained on, over all runs."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0


class Director:
    """Reads plans and gives orders until the stream ends, a limit is reached or somebody wants to stop.

    Attributes:
        stopped: Why it stopped before the end of the stream; None at its end.
    """

    def __init__(
        self,
        section: TrainSection,
        ranks: Ranks,
        plans: PlanQueue,
        progress: Progress,
        store: Store,
        schedule: Schedule,
        figures: Figures,
        held_out: HeldOutRows,
        totals: Totals,
    ) -> None:
        self._section = section
        self._ranks = ranks
        self._plans = plans
        self._progress = progress
        self._store = store
        self._schedule = schedule
        self._figures = figures
        self._held_out = held_out
        self._totals = totals
        self._saved = self._evaluated = progress.step
        self._began = progress.step
        self._said_stalled = False
        self.stopped: str | None = None

    @property
    def trained(self) -> int:
        """Steps of this run."""
        return self._progress.step - self._began

    def orders(self, wants_to_stop: Callable[[], bool]) -> Iterator[list[Order]]:
        """The orders, one after the other; each is carried out before the next is asked for."""
        while True:
            if wants_to_stop():
                self.stopped = "a signal"
                log.info("train.stopping", step=self._progress.step, why=self.stopped)
                break
            found = self._plans.get(WAIT_S)
            if isinstance(found, End):
                self._note(found.state)
                yield from self._finish()
                return
            if found is None:
                if self._is_stalled():
                    break
                yield self._all(Wait())
                continue
            yield from self._take(found)
            if self._progress.step == self._section.max_steps:
                yield from self._finish()
                return
        if self._progress.step > self._saved:
            yield from self._save(result=False)
        yield self._all(Stop())

    def _take(self, plan: StepPlan) -> Iterator[list[Order]]:
        step, section = self._progress.step, self._section
        self._said_stalled = False
        if step == 0:
            yield from self._evaluate()
        rate = self._schedule.rate(step, None if plan.left_steps is None else plan.left_steps + 1)
        yield self._steps(plan, rate)
        self._totals.examples += plan.count
        self._totals.tokens += plan.tokens
        self._totals.target_tokens += plan.target_tokens
        self._note(plan.state)
        self._say(plan, rate)
        if self._progress.step % section.eval_every_steps == 0:
            yield from self._evaluate()
        if self._progress.step % section.save_every_steps == 0:
            yield from self._save(result=False)

    def _steps(self, plan: StepPlan, rate: float) -> list[Order]:
        """Row i is for rank i modulo their number."""
        kind, world = self._section.loss, self._ranks.world
        whole = denominator(plan.rows, kind)
        weights = [target_weights(row, kind) for row in plan.rows]
        return [
            Step(plan.rows[rank::world], tuple(weights[rank::world]), whole, rate) for rank in range(world)
        ]

    def _finish(self) -> Iterator[list[Order]]:
        if self._progress.step:
            if self._evaluated != self._progress.step or not self._progress.evaluation:
                yield from self._evaluate()
            yield from self._save(result=True)
        yield self._all(Stop())

    def _evaluate(self) -> Iterator[list[Order]]:
        rows = self._held_out()
        if rows is None:
            return
        yield [
            Evaluate({kind: dealt[rank] for kind, dealt in rows.items()}) for rank in range(self._ranks.world)
        ]
        self._evaluated = self._progress.step
        self._figures.evaluation(self._progress.step, dict(self._progress.evaluation))

    def _save(self, *, result: bool) -> Iterator[list[Order]]:
        yield self._all(Save(result=result))
        self._saved = self._progress.step
        log.info("train.saved", step=self._saved)

    def _note(self, stream: dict[str, Any]) -> None:
        self._store.stream = stream
        self._store.noted = {
            "schedule": self._schedule.state(),
            "skipped": self._progress.skipped,
            "totals": {
                "examples": self._totals.examples,
                "tokens": self._totals.tokens,
                "target_tokens": self._totals.target_tokens,
            },
        }

    def _is_stalled(self) -> bool:
        """Whether to stop because nothing has come for too long."""
        idle = self._plans.idle
        if idle is None or not idle.stalled:
            return False
        if not self._said_stalled:
            self._said_stalled = True
            log.warning("train.stalled", nothing_for_s=round(idle.waited_s), on_stall=self._section.on_stall)
        if self._section.on_stall == "wait":
            return False
        self.stopped = f"the stream has brought nothing for {idle.waited_s:.0f} s"
        return True

    def _say(self, plan: StepPlan, rate: float) -> None:
        progress = self._progress
        line = {
            "step": progress.step,
            "loss": progress.loss,
            "rate": rate,
            "grad_norm": progress.grad_norm,
            "skipped": progress.skipped,
            "examples": plan.count,
            "tokens": plan.tokens,
            "target_tokens": plan.target_tokens,
            "queue": self._plans.depth,
            "stream": dict(self._plans.figures),
        }
        self._figures.step(line, self._plans.waited_s)

    def _all(self, order: Order) -> list[Order]:
        return [order] * self._ranks.world
