"""What is written down of a training as it goes, and said on stderr; a verdict at the end.

In OUT:

    metrics.jsonl     a line a step, one an evaluation, and one when a process of the training ends
    trained.jsonl     for each step the examples that it trained on, with their losses
    task_losses.json  how hard each task is
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import structlog

from streamsyn.trainer.examples import StepPlan
from streamsyn.trainer.metrics.mfu import Speed
from streamsyn.trainer.metrics.step_log import StepLog, TaskLosses

log = structlog.get_logger()

_LOG_EVERY_S = 2.0
_MUCH_WAITING = 0.1
"""From this share of its time on, waiting is what bounds a training."""
_WHOLE = 1000.0
"""Beyond this nobody reads what is behind the point."""
_SHOWN = ("step", "loss", "rate", "tokens_per_s", "target_tokens_per_s", "mfu", "queue", "read_ahead")

Track = Callable[[str, Mapping[str, Any], int], None]
"""Takes figures of a kind, and the step they belong to, elsewhere."""


class TrainingMetrics:
    """Keeps OUT's figures. Lines of steps that come again are taken out first.

    Args:
        out: OUT.
        step: Where the training stands; below 0 nothing is kept.
        tasks: What `tasks.state` gave at that step.
        speed: What a step costs, and what the devices can do; None where that is not known.
        track: Where figures go besides.

    Raises:
        SinkError: They cannot be written; so for each of its methods.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        tasks: Mapping[str, Mapping[str, float]] | None = None,
        speed: Speed | None = None,
        track: Track | None = None,
    ) -> None:
        self._metrics = StepLog(out / "metrics.jsonl", step)
        self._trained = StepLog(out / "trained.jsonl", step)
        self.tasks = TaskLosses(out / "task_losses.json", tasks or {})
        self._speed = speed
        self._track = track
        self._started = self._began = time.monotonic()
        self._logged = 0.0
        self._waited_before = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this run began to train."""
        return time.monotonic() - self._started

    def lap(self) -> None:
        """What went on up to now is no part of the next step's training."""
        self._began = time.monotonic()

    def step(self, line: dict[str, Any], plan: StepPlan, losses: Sequence[float], waited_s: float) -> None:
        """Note a step, which took from the last `lap` to now, and before that waited for its plan.

        Args:
            line: What is known of it: its number, loss, tokens and more.
            plan: What it trained on.
            losses: Those of the plan's examples; not finite where a step was skipped.
            waited_s: Time that the training has waited for plans so far.
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
        if self._speed is not None:
            rates["mfu"] = round(self._speed.utilisation(plan, trained), 4)
        whole = {**line, **rates}
        self._write("step", whole, at)
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            _say(whole)

    def evaluation(self, step: int, found: dict[str, Any]) -> None:
        """Note an evaluation."""
        self._write("evaluation", {"step": step, **found}, time.time())
        log.info("train.evaluation", step=step, **{name: _short(value) for name, value in found.items()})

    def sync(self, step: int) -> None:
        """Return when all that was noted is on disk: what a checkpoint holds must not be missing here."""
        self._trained.sync()
        self._metrics.sync()
        self.tasks.write(step, now=True)

    def end(self, line: Mapping[str, Any], waited_s: float, stream_waited_s: float) -> dict[str, Any]:
        """Note that this process trains no more; the line with its verdict, None when it made no step.

        Args:
            line: Why, and totals; `steps_of_run` among them.
            waited_s: Time that the training has waited for plans.
            stream_waited_s: What of it was because the stream had nothing more.
        """
        elapsed = self.elapsed_s
        shares = waited_s / elapsed, stream_waited_s / elapsed
        whole = {
            **line,
            "wall_s": round(elapsed, 3),
            "wait_share": round(shares[0], 4),
            "stream_wait_share": round(shares[1], 4),
            "verdict": verdict(*shares) if line["steps_of_run"] else None,
        }
        self._write("end", whole, time.time())
        self._metrics.sync()
        return whole

    def _write(self, kind: str, line: dict[str, Any], at: float) -> None:
        self._metrics.append({"kind": kind, **line, "at": at})
        if self._track is not None:
            self._track(kind, line, line["step"])


def verdict(wait_share: float, stream_wait_share: float) -> str:
    """What bounds a training.

        generation-bound    it waited much for samples to be written: more generators would speed it up
        reading-bound       they were there, and it waited much for them to be read and put into tokens
        training-bound      it hardly waited: the stream is ahead of it

    Args:
        wait_share: Share of its time that it waited for plans.
        stream_wait_share: What of it was because the stream had nothing more.
    """
    if stream_wait_share >= _MUCH_WAITING:
        return "generation-bound"
    return "reading-bound" if wait_share >= _MUCH_WAITING else "training-bound"


def _say(line: Mapping[str, Any]) -> None:
    log.info(
        "train.step",
        **{name: _short(line[name]) for name in _SHOWN if line.get(name) is not None},
        age_s=_short(line["age_median_s"]),
        wait=f"{line['wait_share']:.0%}",
        dropped=line["dropped"],
    )


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if _WHOLE <= abs(value) < math.inf else float(f"{value:.4g}")
