"""Rank 0's decisions: when to train, evaluate, save, publish and stop. One command for each rank at a
time.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import StreamsynError, TrainingFailed
from streamsyn.trainer.commands import Command, Publish, Ranks, Save, Step, Stop, Wait, WriteResult
from streamsyn.trainer.evaluation.eval_servers import EvalServers
from streamsyn.trainer.evaluation.evaluations import Evaluations
from streamsyn.trainer.examples import End, StepPlan
from streamsyn.trainer.loop import Progress, Schedule
from streamsyn.trainer.metrics.record import TrainingMetrics
from streamsyn.trainer.model.loss import LossKind, denominator, target_weights
from streamsyn.trainer.saving.store import Store
from streamsyn.trainer.stream.planner import PlanQueue

log = structlog.get_logger()

MAX_SKIPPED = 20
"""Skipped steps in a row that end a training: its weights are no longer any good."""
_WAIT_S = 5.0
"""While there is no plan, `Wait` is sent to the ranks this often."""


@dataclass(slots=True)
class Totals:
    """What was trained on, over all runs."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0


class Controller:
    """Turns plans into commands until the stream ends, a limit is reached or a rank wants to stop.

    Args:
        section: The section `train`.
        ranks: All ranks.
        plans: What to train on.
        progress: Results of the commands, kept by the loop.
        store: Where the state for the next checkpoint is put.
        schedule: The learning rate.
        metrics: Where steps and evaluations are recorded.
        evaluations: Decides what is evaluated.
        totals: Counts of earlier runs; continued here.
        eval_servers: Servers whose results are recorded as they come.

    Attributes:
        stopped: Why the training stopped before the end of the stream; None if it did not.
    """

    def __init__(
        self,
        section: TrainSection,
        ranks: Ranks,
        plans: PlanQueue,
        progress: Progress,
        store: Store,
        schedule: Schedule,
        metrics: TrainingMetrics,
        evaluations: Evaluations,
        totals: Totals,
        eval_servers: EvalServers | None = None,
    ) -> None:
        self._section = section
        self._ranks = ranks
        self._plans = plans
        self._progress = progress
        self._store = store
        self._schedule = schedule
        self._metrics = metrics
        self._evaluations = evaluations
        self._totals = totals
        self._eval_servers = eval_servers
        self._began = self._saved = progress.step
        self._skipped = 0
        """Skipped steps in a row, up to the last step."""
        self._is_save_due = False
        self._published = -1
        self._warned_stalled = self._warned_zero_rate = False
        self.stopped: str | None = None

    def commands(self, wants_to_stop: Callable[[], bool]) -> Iterator[list[Command]]:
        """The commands for all ranks. Each must be carried out before the next one is taken.

        Args:
            wants_to_stop: Whether a rank has received a signal.

        Raises:
            StreamsynError: The stream cannot be read, or the training has diverged.
        """
        while True:
            if wants_to_stop():
                self.stopped = "a signal"
                log.info("train.stopping", step=self._progress.step, why=self.stopped)
                break
            if self._is_at_limit:
                self._schedule.reopen()
                yield from self._finish()
                return
            self._store.settle(wait=False)
            self.record_servers()
            try:
                found = self._plans.get(_WAIT_S)
            except StreamsynError:
                yield from self._save_unsaved()
                raise
            if isinstance(found, End):
                self._store.stream = found.state
                self._schedule.reopen()
                yield from self._finish()
                return
            if found is None:
                if self._is_stalled():
                    break
                yield self._all(Wait())
                continue
            yield from self._evaluate()  # before the first step, or where an earlier run was stopped
            if not wants_to_stop():
                yield from self._train(found)
        yield from self._save_unsaved()
        self._store.settle()
        yield self._all(Stop())

    def record_servers(self) -> None:
        """Record the evaluations that servers have finished.

        Raises:
            SinkError: They cannot be written.
        """
        for one in self._eval_servers.results() if self._eval_servers is not None else ():
            self._metrics.server_evaluation(one.step, one.found, self._progress.step)

    def record_end(self) -> dict[str, Any]:
        """Record in the metrics that this run ends, and return the line.

        Raises:
            SinkError: It cannot be written.
        """
        progress, stream = self._progress, self._plans.statistics
        line = {
            "step": progress.step,
            "why": self.why,
            "steps_of_run": progress.step - self._began,
            "skipped": progress.skipped,
            "examples": self._totals.examples,
            "tokens": self._totals.tokens,
            "target_tokens": self._totals.target_tokens,
            "dropped": sum(stream["dropped"].values()),
            "stream": stream,
        }
        return self._metrics.end(line, self._plans.waited_s, self._plans.stream_waited_s)

    @property
    def why(self) -> str:
        """Why there are no more commands."""
        if self.stopped is None and self._is_at_limit:
            return "train.max_steps"
        return self.stopped or "the stream ended"

    @property
    def _is_at_limit(self) -> bool:
        limit = self._section.max_steps
        return (
            limit is not None and self._progress.step >= limit
        )  # above it if an earlier run had a higher one

    def _train(self, plan: StepPlan) -> Iterator[list[Command]]:
        """One step and whatever is due after it."""
        step, skipped, section = self._progress.step, self._progress.skipped, self._section
        self._warned_stalled = False
        self._metrics.lap()
        # A step that a slow stream has not filled must not move the weights as far as a full one.
        rate = self._schedule.rate(step, self._left(plan)) * plan.fill
        if not rate and not self._warned_zero_rate:
            self._warned_zero_rate = True
            log.warning("train.rate_is_zero", step=step, why="train.total_steps have been made")
        kind = self._kind
        yield self._step_commands(plan, kind, rate)
        self._totals.examples += plan.count
        self._totals.tokens += plan.tokens
        self._totals.target_tokens += plan.target_tokens
        self._skipped = self._skipped + 1 if self._progress.skipped > skipped else 0
        self._record(plan, kind, rate)
        self._check_diverged()
        self._store.stream = plan.state
        yield from self._publish()
        yield from self._evaluate()
        self._is_save_due |= self._progress.step % section.save_every_steps == 0
        if self._is_save_due and not self._skipped:  # else it would replace a checkpoint from before them
            yield from self._save()

    def _left(self, plan: StepPlan) -> int | None:
        """About how many steps remain with this one, up to the end of the stream or `train.max_steps`."""
        limit = self._section.max_steps
        known = [] if plan.left_steps is None else [plan.left_steps + 1]
        known += [] if limit is None else [limit - self._progress.step]
        return min(known, default=None)

    @property
    def _kind(self) -> LossKind:
        """The kind of loss of the step that comes next."""
        section = self._section
        return "token" if self._progress.step < section.token_loss_steps else section.loss

    def _denominator(self, plan: StepPlan, kind: LossKind) -> float:
        """The divisor of a step's loss.

        Steps hold different numbers of samples and of targets, as the samples of each are alike in length.
        Samples (`sequence`) or targets (`token`) weigh the same in all of them: losses are divided by the
        number that is usual.
        """
        usual = {"sequence": plan.usual_count, "token": plan.usual_targets}.get(kind)
        return denominator(plan.rows, kind) if usual is None else usual

    def _step_commands(self, plan: StepPlan, kind: LossKind, rate: float) -> list[Command]:
        """A `Step` for each rank: row i is for group i % groups."""
        groups = self._ranks.groups
        whole = self._denominator(plan, kind)
        weights = [target_weights(row, kind) for row in plan.rows]
        return self._ranks.for_ranks(
            [
                Step(plan.rows[group::groups], tuple(weights[group::groups]), whole, rate)
                for group in range(groups)
            ]
        )

    def _record(self, plan: StepPlan, kind: LossKind, rate: float) -> None:
        progress, stream = self._progress, self._plans.statistics
        line = {
            "step": progress.step,
            "loss": progress.loss * self._denominator(plan, kind) / denominator(plan.rows, kind),
            "rate": rate,
            "fill": plan.fill,
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
        losses = [math.nan] * plan.count if self._skipped else progress.losses
        self._metrics.step(line, plan, losses, self._plans.waited_s)

    def _check_diverged(self) -> None:
        """Warn after 1, 2, 4, ... skipped steps in a row.

        Raises:
            TrainingFailed: After MAX_SKIPPED of them. Checkpoints from before them are left as they are.
        """
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

    def _is_stalled(self) -> bool:
        """Whether to stop because the stream has brought nothing for `train.stall_s`."""
        idle = self._plans.idle
        if idle is None or not idle.stalled:
            return False
        if not self._warned_stalled:
            self._warned_stalled = True
            log.warning("train.stalled", nothing_for_s=round(idle.waited_s), on_stall=self._section.on_stall)
        if self._section.on_stall == "wait":
            return False
        self.stopped = f"the stream has brought nothing for {idle.waited_s:.0f} s"
        return True

    def _finish(self) -> Iterator[list[Command]]:
        if self._progress.step:
            yield from self._publish(last=True)
            yield from self._evaluate(last=True)
            yield from self._save()
            self._store.settle()
            yield self._all(WriteResult())
        yield self._all(Stop())

    def _evaluate(self, *, last: bool = False) -> Iterator[list[Command]]:
        progress = self._progress
        commands = self._evaluations.due(progress.step, last=last)
        if commands is None:
            return
        yield list(commands)
        found = self._evaluations.metrics(progress.step, commands, progress.measured, progress.answers)
        self._metrics.evaluation(progress.step, found)
        if "partial" in found:
            log.warning("train.evaluation_stopped", step=progress.step, answers=len(progress.answers))
            if last:
                self.stopped = "a signal, during the last evaluation"

    def _publish(self, *, last: bool = False) -> Iterator[list[Command]]:
        """Not after a signal: the run that resumes this training publishes again."""
        section, step = self._section.publish, self._progress.step
        if section is None or step == self._published or (step % section.every_steps and not last):
            return
        began = time.monotonic()
        yield self._all(Publish())
        self._metrics.pause("publication", step, time.monotonic() - began)
        self._published = step

    def _save_unsaved(self) -> Iterator[list[Command]]:
        if self._progress.step > self._saved and not self._skipped:  # as in `_train`
            yield from self._save()

    def _save(self) -> Iterator[list[Command]]:
        self._metrics.sync(self._progress.step)
        self._store.noted = {
            "schedule": self._schedule.state(),
            "skipped": self._progress.skipped,
            "task_losses": self._metrics.tasks.state(),
            "evaluations": self._evaluations.state(),
            "totals": asdict(self._totals),
        }
        began = time.monotonic()
        self._store.settle()  # so that its failure is reported before all ranks are told to save
        yield self._all(Save())
        # All ranks have gone on to the next command.
        self._metrics.pause("checkpoint", self._progress.step, time.monotonic() - began)
        self._saved, self._is_save_due = self._progress.step, False

    def _all(self, command: Command) -> list[Command]:
        return [command] * self._ranks.world
