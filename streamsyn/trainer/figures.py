"""What a person sees of a training: OUT/metrics.jsonl, lines on stderr, and a verdict at the end."""

import time
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import SinkError
from streamsyn.sink.rundir import write_whole

log = structlog.get_logger()

_LOG_EVERY_S = 2.0
_MUCH_WAITING = 0.1
"""From this share of its time on, a training that waits for the stream is bound by the generators."""


class Figures:
    """Writes one line a step, and one an evaluation. Lines of steps that come again are taken out first."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if line.get("step", 0) <= step]
        write_whole(path, b"".join(orjson.dumps(line) + b"\n" for line in kept))
        self._started = self._last = time.monotonic()
        self._logged = 0.0
        self._waited_before = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this run began to train."""
        return time.monotonic() - self._started

    def step(self, line: dict[str, Any], waited_s: float) -> None:
        """Note a step.

        Args:
            line: What is known of it: step, loss, tokens and more.
            waited_s: Time that the training has waited for plans so far.
        """
        now = time.monotonic()
        took, self._last = now - self._last, now
        waited, self._waited_before = waited_s - self._waited_before, waited_s
        rates = {
            "tokens_per_s": round(line["tokens"] / took, 1),
            "target_tokens_per_s": round(line["target_tokens"] / took, 1),
            "step_s": round(took, 4),
            "wait_s": round(waited, 4),
            "wait_share": round(waited_s / self.elapsed_s, 4),
        }
        self._append({"kind": "step", **line, **rates, "at": time.time()})
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            shown = ("step", "loss", "rate", "tokens", "queue")
            log.info(
                "train.step",
                **{name: _short(line[name]) for name in shown if line.get(name) is not None},
                tokens_per_s=round(rates["tokens_per_s"]),
                wait=f"{rates['wait_share']:.0%}",
                dropped=sum(line.get("stream", {}).get("dropped", {}).values()),
            )

    def evaluation(self, step: int, found: dict[str, Any]) -> None:
        """Note an evaluation; its time is none of the next step's."""
        self._append({"kind": "evaluation", "step": step, **found, "at": time.time()})
        log.info("train.evaluation", step=step, **{name: _short(value) for name, value in found.items()})
        self._last = time.monotonic()

    def verdict(self, waited_s: float) -> tuple[str, float]:
        """What bounds this training, and the share of its time that it waited for the stream."""
        share = waited_s / self.elapsed_s if self.elapsed_s > 0 else 0.0
        return ("generation-bound" if share >= _MUCH_WAITING else "training-bound"), share

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            raise SinkError(f"cannot write {self._path}: {error.strerror}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run, but for a torn one."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            parsed = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and line.endswith(b"\n"):
            found.append(parsed)
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
