"""`train --ray`: the ranks of a training on a Ray cluster.

When some are lost, all start again from the last checkpoint: as many as before, or as many as the cluster
still has room for. A checkpoint is read by any number of them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import structlog

from streamsyn.cluster.ranks import RanksLost, Stops, run_ranks
from streamsyn.config.command_sections import ClusterSection, TrainSection
from streamsyn.config.data_paths import absolute_path, is_url
from streamsyn.errors import ConfigError
from streamsyn.trainer.signals import EXIT_STOPPED, stop_on_signals
from streamsyn.trainer.supervisor import GiveUp, Restart, RestartPolicy, TrainerExit, latest_checkpoint
from streamsyn.trainer.training_request import TrainRequest

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RankOfTraining:
    """What each worker runs; it is pickled, and torch is imported where it runs.

    Attributes:
        request: What to train on what, with absolute paths.
        as_json: Whether log lines are JSON objects.
    """

    request: TrainRequest
    as_json: bool

    def __call__(self, *, stops: Stops) -> int:
        """Train as the rank that the environment names; return the exit code."""
        from streamsyn.telemetry import configure_logs
        from streamsyn.trainer.training import train

        configure_logs(as_json=self.as_json)
        request = self.request
        return train(request.config, request.source, request.model, request.out, stops)


def train_on_cluster(request: TrainRequest, *, as_json: bool) -> int:
    """Train on the cluster of `cluster.address` until the stream ends.

    Args:
        request: What to train on what.
        as_json: Whether the workers' log lines are JSON objects.

    Returns:
        The exit code: 0 when the stream has ended, 75 when the training was stopped before.

    Raises:
        ConfigError: The training cannot start or continue; the message says why.
        TrainingFailed: Likewise, by what the training met.
        RanksLost: Workers were lost again and again, without a new checkpoint.
    """
    section = request.config.cluster
    check_workers(section, request.config.train)
    if request.source == "-":
        raise ConfigError("--from -: the workers of --ray do not have this process's stdin; give DIR or URL")
    source = request.source if is_url(request.source) else absolute_path(request.source)
    request = replace(request, source=source, out=request.out.absolute())
    rank = RankOfTraining(request, as_json)
    restarts = RestartPolicy(latest_checkpoint(request.out))
    stop = _Stop()
    with stop_on_signals(stop.ask):
        while True:
            log.info("train.on_cluster", workers=section.workers, max_workers=section.max_workers)
            try:
                return run_ranks(section, rank, request.out, stop.told)
            except RanksLost as error:
                lost = error
            match restarts.after(TrainerExit(1), latest_checkpoint(request.out), stopping=stop.is_asked):
                case Restart(after_s, number):
                    log.warning("train.restarts", because=str(lost), in_s=after_s, number=number)
                case GiveUp(code) if code == EXIT_STOPPED:
                    return code
                case GiveUp():
                    raise lost
            if stop.is_asked_within(after_s):
                return EXIT_STOPPED


class _Stop:
    """The request of this process's user to stop."""

    def __init__(self) -> None:
        self.is_asked = False
        self._woken: SimpleQueue[None] = SimpleQueue()  # an Event must not be set in a signal handler
        self._tell: Callable[[], None] = lambda: None

    def ask(self) -> None:
        """Stop. Safe in a signal handler."""
        self.is_asked = True
        self._woken.put(None)
        self._tell()

    @contextmanager
    def told(self, tell: Callable[[], None]) -> Iterator[None]:
        """A context in which `tell` is called at the request, also if it came before."""
        self._tell = tell
        if self.is_asked:
            tell()
        try:
            yield
        finally:
            self._tell = lambda: None

    def is_asked_within(self, seconds: float) -> bool:
        """Wait for the request for some seconds."""
        try:
            self._woken.get(timeout=seconds)
        except Empty:
            return False
        return True


def check_workers(section: ClusterSection, train: TrainSection) -> None:
    """Check that the rows of a step can be divided among each number of workers that there may be.

    Raises:
        ConfigError: They cannot.
    """
    least, most = section.workers, section.max_workers or section.workers
    if most < least:
        raise ConfigError(f"cluster.max_workers = {most} is less than cluster.workers = {least}")
    degree = train.sequence_parallel
    if degree > 1 and (least % degree or most != least):
        raise ConfigError(
            f"train.sequence_parallel: groups of {degree} need a number of workers that is a multiple of it, "
            "and does not change (cluster.workers, cluster.max_workers)"
        )
    groups = [number // degree for number in range(least, most + 1)]
    if any(train.rows_per_step % number for number in groups):
        workers = f"{least} workers" if most == least else f"each of {least} to {most} workers"
        raise ConfigError(
            f"train.rows_per_step: {train.rows_per_step} rows cannot be divided among {workers}; use a "
            f"multiple of {math.lcm(*groups)}"
        )
