"""What rank 0 decides: when to train, to evaluate, to save, to stop. One order for each rank at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import structlog

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import StreamsynError, TrainingFailed
from streamsyn.trainer.commands import WAIT_S, Command, Publish, Ranks, Save, Step, Stop, Wait
from streamsyn.trainer.evaluation.evaluations import Evaluations
from streamsyn.trainer.examples import End, StepPlan
from streamsyn.trainer.loop import Progress, Schedule
from streamsyn.trainer.metrics.record import TrainingMetrics
from streamsyn.trainer.model.loss import denominator, target_weights
from streamsyn.trainer.saving.store import Store
from streamsyn.trainer.stream.planner import PlanQueue

log = structlog.get_logger()

MAX_SKIPPED = 20
"""So many steps in a row without an update end a training: its weights are no good any more."""


@dataclass(slots=True)
class Totals:
    """What was trained on, over all runs."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0


class Controller:
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
        figures: TrainingMetrics,
        evaluations: Evaluations,
        totals: Totals,
    ) -> None:
        self._section = section
        self._ranks = ranks
        self._plans = plans
        self._progress = progress
        self._store = store
        self._schedule = schedule
        self._figures = figures
        self._evaluations = evaluations
        self._totals = totals
        self._saved = progress.step
        self._began = progress.step
        self._skipped = 0
        """Steps in a row, up to the last one, that changed nothing."""
        self._is_save_due = False
        self._published = -1
        self._said_stalled = self._said_zero = False
        self.stopped: str | None = None

    @property
    def trained(self) -> int:
        """Steps of this run."""
        return self._progress.step - self._began

    @property
    def why(self) -> str:
        """Why there are no more orders."""
        if self.stopped is None and self._is_at_limit:
            return "train.max_steps"
        return self.stopped or "the stream ended"

    def orders(self, wants_to_stop: Callable[[], bool]) -> Iterator[list[Command]]:
        """The orders, one after the other; each is carried out before the next is asked for.

        Raises:
            StreamsynError: The stream cannot be read, or the training has diverged.
        """
        while True:
            if wants_to_stop():
                self.stopped = "a signal"
                log.info("train.stopping", step=self._progress.step, why=self.stopped)
                break
            if self._is_at_limit:
                yield from self._finish()
                return
            try:
                found = self._plans.get(WAIT_S)
            except StreamsynError:
                yield from self._save_what_is_new()
                raise
            if isinstance(found, End):
                self._store.stream = found.state
                self._schedule.forget_the_end()
                yield from self._finish()
                return
            if found is None:
                if self._is_stalled():
                    break
                yield self._all(Wait())
                continue
            yield from self._evaluate()  # before the first step, or where an earlier run was stopped
            if not wants_to_stop():
                yield from self._take(found)
        yield from self._save_what_is_new()
        yield self._all(Stop())

    @property
    def _is_at_limit(self) -> bool:
        limit = self._section.max_steps
        return limit is not None and self._progress.step >= limit  # an earlier run may have had a higher one

    def _take(self, plan: StepPlan) -> Iterator[list[Command]]:
        step, skipped, section = self._progress.step, self._progress.skipped, self._section
        self._said_stalled = False
        self._figures.lap()
        rate = self._schedule.rate(step, None if plan.left_steps is None else plan.left_steps + 1)
        if not rate and not self._said_zero:
            self._said_zero = True
            log.warning("train.rate_is_zero", step=step, why="train.total_steps have been made")
        yield self._steps(plan, rate)
        self._totals.examples += plan.count
        self._totals.tokens += plan.tokens
        self._totals.target_tokens += plan.target_tokens
        self._skipped = self._skipped + 1 if self._progress.skipped > skipped else 0
        self._say(plan, rate, skipped=self._skipped > 0)
        self._check_skipped()
        self._store.stream = plan.state
        yield from self._publish()
        yield from self._evaluate()
        self._is_save_due |= self._progress.step % section.save_every_steps == 0
        if self._is_save_due and not self._skipped:  # else it would push out a checkpoint from before
            yield from self._save(result=False)

    def _check_skipped(self) -> None:
        """Say that steps change nothing, ever more rarely; in the end stop, and leave alone what is saved."""
        count, step = self._skipped, self._progress.step
        if count and not count & (count - 1):
            log.warning("train.step_skipped", step=step, in_a_row=count, why="its gradient is not finite")
        if count < MAX_SKIPPED:
            return
        kept = "there is no checkpoint yet; try"
        if self._saved:
            kept = f"checkpoints/step-{self._saved:07d} is from before them; try, with another --out,"
        raise TrainingFailed(
            f"the training has diverged: the gradient was not finite at {count} steps in a row, up to step "
            f"{step}, and nothing was saved since; {kept} a lower train.learning_rate or more "
            f"train.warmup_steps"
        )

    def _steps(self, plan: StepPlan, rate: float) -> list[Command]:
        """Row i is for rank i modulo their number."""
        kind, world = self._section.loss, self._ranks.world
        whole = denominator(plan.rows, kind)
        weights = [target_weights(row, kind) for row in plan.rows]
        return [
            Step(plan.rows[rank::world], tuple(weights[rank::world]), whole, rate) for rank in range(world)
        ]

    def _finish(self) -> Iterator[list[Command]]:
        if self._progress.step:
            yield from self._publish(last=True)
            yield from self._evaluate(last=True)
            yield from self._save(result=True)
        yield self._all(Stop())

    def _evaluate(self, *, last: bool = False) -> Iterator[list[Command]]:
        progress = self._progress
        orders = self._evaluations.due(progress.step, last=last)
        if orders is None:
            return
        yield list(orders)
        found = self._evaluations.figures(progress.step, orders, progress.measured, progress.answers)
        self._figures.evaluation(progress.step, found)
        if "partial" in found:
            log.warning("train.evaluation_stopped", step=progress.step, answers=len(progress.answers))
            if last:
                self.stopped = "a signal, during the last evaluation"

    def _save_what_is_new(self) -> Iterator[list[Command]]:
        if self._progress.step > self._saved and not self._skipped:  # as in `_take`
            yield from self._save(result=False)

    def _save(self, *, result: bool) -> Iterator[list[Command]]:
        self._figures.sync(self._progress.step)
        self._store.noted = {
            "schedule": self._schedule.state(),
            "skipped": self._progress.skipped,
            "task_losses": self._figures.tasks.state(),
            "evaluations": self._evaluations.state(),
            "totals": asdict(self._totals),
        }
        yield self._all(Save(result=result))
        self._saved, self._is_save_due = self._progress.step, False
        log.info("train.saved", step=self._saved)

    def _publish(self, *, last: bool = False) -> Iterator[list[Command]]:
        """Not when stopped: who goes on with this training will publish again."""
        section, step = self._section.publish, self._progress.step
        if section is None or step == self._published or (step % section.every_steps and not last):
            return
        yield self._all(Publish())
        self._published = step

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

    def _say(self, plan: StepPlan, rate: float, *, skipped: bool) -> None:
        progress, stream = self._progress, self._plans.figures
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
            "read_ahead": stream["held"],
            "dropped": sum(stream["dropped"].values()),
            "stream": stream,
        }
        losses = [math.nan] * plan.count if skipped else progress.losses
        self._figures.step(line, plan, losses, self._plans.waited_s)

    def _all(self, order: Command) -> list[Command]:
        return [order] * self._ranks.world
