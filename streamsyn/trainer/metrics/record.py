"""Records a training in OUT's metrics.jsonl, trained.jsonl and task_losses.json, and logs a summary.

The last line of metrics.jsonl has a verdict: what limited the speed of the training.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import orjson
import structlog

from streamsyn.io.durable import write_whole
from streamsyn.trainer.examples import Example, StepPlan
from streamsyn.trainer.metrics.mfu import Balance, Mfu
from streamsyn.trainer.metrics.step_log import AT_STEP, StepLog

log = structlog.get_logger()

_LOG_EVERY_S = 2.0
_TASK_LOSSES_EVERY_S = 30.0
_BOUND_BY_WAITING = 0.1
"""From this share of its time on, waiting limits a training."""
_ROUNDED_FROM = 1000.0
"""Larger numbers are logged without decimals."""
HALF_LIFE = 32
"""The weight of a loss halves after this many further examples of its task."""
_DECAY = 0.5 ** (1 / HALF_LIFE)
_LOGGED = ("step", "loss", "rate", "tokens_per_s", "target_tokens_per_s", "mfu", "queue", "read_ahead")

Pause = Literal["checkpoint", "publication"]
"""What holds up a training."""

Track = Callable[[str, Mapping[str, Any], int], None]
"""Sends the metrics of a line elsewhere. Arguments: the kind of line, its fields, the step."""


class TrainingMetrics:
    """Writes the metrics files of a training. Lines after the step where it resumes are cut off first.

    Args:
        out: OUT.
        step: The step where the training resumes; below 0 no line is kept.
        tasks: What `tasks.state` returned at that step.
        mfu: Computes the utilisation of a step; None where model or device are unknown.
        track: Receives the metrics too.
        balance: Computes how long ranks wait for the slowest one; None for one rank, or an unknown model.

    Raises:
        SinkError: A file cannot be written. Each method raises it too.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        tasks: Mapping[str, Mapping[str, float]] | None = None,
        mfu: Mfu | None = None,
        track: Track | None = None,
        balance: Balance | None = None,
    ) -> None:
        self._metrics = StepLog(out / "metrics.jsonl", step)
        self._trained = StepLog(out / "trained.jsonl", step)
        self.tasks = TaskLosses(out / "task_losses.json", tasks or {})
        self._mfu = mfu
        self._track = track
        self._balance = balance
        self._pauses: dict[Pause, list[float]] = {"checkpoint": [], "publication": []}
        self._started = self._began = time.monotonic()
        self._logged = 0.0
        self._waited_before = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this process began to train."""
        return time.monotonic() - self._started

    def lap(self) -> None:
        """Start the clock of the next step; time up to now does not count as its training."""
        self._began = time.monotonic()

    def step(self, line: dict[str, Any], plan: StepPlan, losses: Sequence[float], waited_s: float) -> None:
        """Record a step, which trained from the last `lap` to now, after waiting for its plan.

        Args:
            line: The fields known to the caller: `step`, `loss`, `tokens`, `target_tokens` and others.
            plan: The samples of the step.
            losses: The loss of each of the plan's examples; not finite if the step was skipped.
            waited_s: Total time so far that the training has waited for plans.
        """
        now, at = time.monotonic(), time.time()
        examples = list(plan.examples())
        self._trained.append(
            {
                "step": line["step"],
                "at": at,
                "examples": [[*one.key, one.id, loss] for one, loss in zip(examples, losses, strict=True)],
            }
        )
        self.tasks.add(examples, losses)
        self.tasks.write(line["step"])
        trained, waited = now - self._began, waited_s - self._waited_before
        took, self._waited_before = trained + waited, waited_s
        ages = [now - one.seen_at for one in examples]
        rates = {
            "tokens_per_s": round(line["tokens"] / took, 1),
            "target_tokens_per_s": round(line["target_tokens"] / took, 1),
            "step_s": round(took, 4),
            "wall_s": round(self.elapsed_s, 3),
            "wait_s": round(waited, 4),
            "wait_share": round(waited_s / self.elapsed_s, 4),
            "age_median_s": round(median(ages), 3),
            "age_max_s": round(max(ages), 3),
        }
        if self._mfu is not None:
            rates["mfu"] = round(self._mfu.utilisation(plan, trained), 4)
        if self._balance is not None:
            idle, slowest = self._balance.idle(plan)
            rates |= {
                "idle_share": round(idle, 4),
                "straggler": slowest,
                "straggler_s": round(idle * trained, 4),
            }
        whole = {**line, **rates}
        self._write("step", whole, at)
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            _log_step(whole)

    def evaluation(self, step: int, found: dict[str, Any]) -> None:
        """Record an evaluation."""
        self._write("evaluation", {"step": step, **found}, time.time())
        log.info("train.evaluation", step=step, **{name: _rounded(value) for name, value in found.items()})

    def server_evaluation(self, step: int, found: Mapping[str, Any], now: int) -> None:
        """Record what servers answered.

        Args:
            step: The step at which the weights were published.
            found: The fields of the line.
            now: The step of the training, by which the line is kept or cut off on resume.
        """
        self._write("server_evaluation", {"step": step, AT_STEP: now, **found}, time.time())
        named = {name: _rounded(value) for name, value in found.items()}
        log.info("train.server_evaluation", step=step, **named)

    def pause(self, kind: Pause, step: int, pause_s: float) -> None:
        """Record for how long a checkpoint or a publication has held up the training of all ranks."""
        self._pauses[kind].append(pause_s)
        self._write(kind, {"step": step, "pause_s": round(pause_s, 4)}, time.time())

    def sync(self, step: int) -> None:
        """Flush everything to disk. Called before a checkpoint, whose steps must not be missing here."""
        self._trained.sync()
        self._metrics.sync()
        self.tasks.write(step, now=True)

    def end(self, line: Mapping[str, Any], waited_s: float, stream_waited_s: float) -> dict[str, Any]:
        """Record the end of this process, and return the line, with the verdict if there was a step.

        Args:
            line: The reason and totals, `steps_of_run` among them.
            waited_s: Total time that the training has waited for plans.
            stream_waited_s: The part of it in which the stream had nothing to read.
        """
        elapsed = self.elapsed_s
        shares = waited_s / elapsed, stream_waited_s / elapsed
        whole = {
            **line,
            "wall_s": round(elapsed, 3),
            "wait_share": round(shares[0], 4),
            "stream_wait_share": round(shares[1], 4),
            "verdict": verdict(*shares) if line["steps_of_run"] else None,
            **{f"{kind}s": len(pauses) for kind, pauses in self._pauses.items()},
            **{f"{kind}_pause_s": round(sum(pauses), 4) for kind, pauses in self._pauses.items()},
        }
        self._write("end", whole, time.time())
        self._metrics.sync()
        return whole

    def _write(self, kind: str, line: dict[str, Any], at: float) -> None:
        self._metrics.append({"kind": kind, **line, "at": at})
        if self._track is not None:
            self._track(kind, line, line.get(AT_STEP, line["step"]))  # trackers want rising steps


class TaskLosses:
    """An exponential moving average of the example losses of each task, kept in OUT/task_losses.json.

    After n examples, the i-th has a weight proportional to 0.5 ** ((n - i) / HALF_LIFE), without the bias
    towards the first example of the usual recursive form.

    Args:
        path: The file.
        state: An earlier return value of `state`.
    """

    def __init__(self, path: Path, state: Mapping[str, Mapping[str, float]]) -> None:
        self._path = path
        self._tasks = {task: dict(found) for task, found in state.items()}
        self._written = time.monotonic()

    def state(self) -> dict[str, dict[str, float]]:
        """For each task its `loss` and the number of `examples` in it."""
        return {task: dict(found) for task, found in self._tasks.items()}

    def add(self, examples: Iterable[Example], losses: Iterable[float]) -> None:
        """Add the losses of examples; those that are not finite are skipped."""
        for example, loss in zip(examples, losses, strict=True):
            if math.isfinite(loss):
                found = self._tasks.setdefault(example.task, {"loss": 0.0, "examples": 0})
                found["examples"] += 1
                share = (1 - _DECAY) / (1 - _DECAY ** found["examples"])
                found["loss"] += share * (loss - found["loss"])

    def write(self, step: int, *, now: bool = False) -> None:
        """Replace the file, at most every 30 s unless `now`.

        Raises:
            SinkError: The file cannot be written.
        """
        if not now and time.monotonic() - self._written < _TASK_LOSSES_EVERY_S:
            return
        self._written = time.monotonic()
        found: dict[str, Any] = {"step": step, "tasks": self._tasks}
        write_whole(self._path, orjson.dumps(found, option=orjson.OPT_INDENT_2))


def verdict(wait_share: float, stream_wait_share: float) -> str:
    """What limits the speed of a training.

        generation-bound    it waited for samples to be generated: more generation servers would help
        reading-bound       samples were there, but it waited for them to be read and tokenised
        training-bound      it hardly waited: generation is ahead of it

    Args:
        wait_share: Share of its time in which it waited for plans.
        stream_wait_share: Share of its time in which the stream had nothing to read.
    """
    if stream_wait_share >= _BOUND_BY_WAITING:
        return "generation-bound"
    return "reading-bound" if wait_share >= _BOUND_BY_WAITING else "training-bound"


def _log_step(line: Mapping[str, Any]) -> None:
    log.info(
        "train.step",
        **{name: _rounded(line[name]) for name in _LOGGED if line.get(name) is not None},
        age_s=_rounded(line["age_median_s"]),
        wait=f"{line['wait_share']:.0%}",
        dropped=line["dropped"],
    )


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if _ROUNDED_FROM <= abs(value) < math.inf else float(f"{value:.4g}")
