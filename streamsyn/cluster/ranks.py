"""Runs a function as the ranks of a process group: Ray Train starts a worker for each on the nodes.

Ray Train sets up torch's process group, and RANK, WORLD_SIZE and their kin, as a launcher would. The function
runs in a thread of each worker, where signals do not arrive: the request to stop comes through an actor.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from streamsyn.cluster.placing import connected
from streamsyn.config.command_sections import ClusterSection
from streamsyn.errors import ConfigError, StreamsynError, TrainingFailed

_PASSED_ON = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "STREAMSYN_", "HF_", "NCCL_", "PYTORCH_", "OMP_")
"""Beginnings of the environment variables of this process that the workers get: accelerate's choice of FSDP2,
where models are kept, how ranks talk to each other."""

Stops = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Makes a context in which a function is called when a stop is asked for."""


class Rank(Protocol):
    """What each rank runs. It is pickled by its name."""

    def __call__(self, *, stops: Stops) -> int:
        """Return the exit code; that of rank 0 counts."""
        ...


class RanksLost(StreamsynError):
    """A worker or its node is gone, or the function failed in a way that another start may not meet."""


class StopRequest:
    """The actor through which the ranks hear that they are to stop."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    async def ask(self) -> None:
        """Ask the ranks to stop."""
        self._asked.set()

    async def asked(self) -> None:
        """Wait until they are to stop."""
        await self._asked.wait()


def run_ranks(section: ClusterSection, rank: Rank, storage: Path, stops: Stops) -> int:
    """Run a function as ranks on the cluster, and wait for its end.

    Args:
        section: The `cluster` section: where, how many, and what each gets.
        rank: The function.
        storage: A folder on storage that all nodes share; Ray Train keeps its own records in it.
        stops: How this process is asked to stop; the ranks are asked then.

    Returns:
        The exit code of rank 0.

    Raises:
        ConfigError: There is no cluster at `cluster.address`, or a rank raised it.
        TrainingFailed: A rank raised it.
        RanksLost: The ranks ended otherwise; another start may go well.
    """
    from ray.train import TrainingFailedError  # here, as it takes a second

    with connected(section.address or "auto", log_to_driver=True):
        actor: Any = ray.remote(StopRequest)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        request = actor.options(num_cpus=0, scheduling_strategy=here).remote()
        trainer = _trainer(section, partial(_as_rank, rank, request), storage)
        # In a thread: in the main one Ray Train would take SIGINT and end workers before they have saved.
        with ThreadPoolExecutor(1, "ray-train") as thread, stops(request.ask.remote):
            try:
                result = thread.submit(trainer.fit).result()
            except RayError as error:
                raise RanksLost(_last_line(error)) from error
            except TrainingFailedError as error:
                raise _reason(error) from error
    code: int = result.return_value
    return code


def _trainer(section: ClusterSection, function: Callable[[], int], storage: Path) -> Any:
    """Return the TorchTrainer. Nothing is restarted by Ray: its caller knows which failures are final."""
    from ray import train
    from ray.train.torch import TorchTrainer

    api: Any = train  # its types are those of the version before
    trainer: Any = TorchTrainer
    least, most = section.workers, section.max_workers or section.workers
    found = {"CPU": float(section.cpus_per_worker), "GPU": float(section.gpus_per_worker)}
    return trainer(
        function,
        scaling_config=api.ScalingConfig(
            num_workers=least if most == least else (least, most),
            use_gpu=section.gpus_per_worker > 0,
            resources_per_worker={name: number for name, number in found.items() if number},
        ),
        run_config=api.RunConfig(
            storage_path=str(storage),
            name="ray",
            failure_config=api.FailureConfig(max_failures=0),
            worker_runtime_env={
                "env_vars": {name: os.environ[name] for name in os.environ if name.startswith(_PASSED_ON)}
            },
        ),
    )


def _as_rank(rank: Rank, request: Any) -> int:
    """Run the function in this worker, until a stop is asked for."""
    return rank(stops=partial(_stopped_by, request))


@contextmanager
def _stopped_by(request: Any, stop: Callable[[], None]) -> Iterator[None]:
    """A context in which `stop` is called when the driver asks for it."""

    def wait() -> None:
        with suppress(RayError):  # the driver is gone: its workers end with it
            ray.get(request.asked.remote())
            stop()

    threading.Thread(target=wait, name="stop-request", daemon=True).start()
    yield


def _reason(error: Exception) -> StreamsynError:
    """Return why the ranks failed: what one of them raised on purpose, or else that they are lost."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, ConfigError | TrainingFailed):
            return raised
    return RanksLost(_last_line(next(iter(failures.values()), error)))


def _last_line(error: BaseException) -> str:
    """Return what happened: the last line, which of a traceback is the error."""
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__).strip()
