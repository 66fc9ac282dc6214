"""A simulated server in a thread of its own, which code that blocks the test's event loop does not delay."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

import orjson
import pytest
from blockbuster import BlockBuster

from streamsyn.simulator.app import running
from streamsyn.simulator.settings import Fault, SimulatorConfig

Faults: TypeAlias = Callable[[int, dict[str, Any]], Fault | None]

QUICK: dict[str, Any] = {
    "fleet.max_in_flight": 8,
    "fleet.backoff_base_s": 0.005,
    "sink.sync_interval_s": 0.01,
    "assembly.contexts_per_sample": 2,
    "run.queue_size": 4,
    "sink.sync_rows": 4,
    "run.drain_timeout_s": 10,
}
"""Small queues: what a run reads ahead is a few seeds."""


class Server:
    """A simulated server over HTTP.

    Attributes:
        url: Its address.
        asked: The chat requests so far.
    """

    def __init__(self, config: SimulatorConfig, fault: Faults | None) -> None:
        self.url = ""
        self.asked: list[str] = []
        self._config = config
        self._fault = fault
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._listening = threading.Event()
        self._was_asked = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="simulator")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def until_asked(self, number: int) -> None:
        """Wait for the request of this number. Blocks."""
        assert self.is_asked(number, 10)

    def is_asked(self, number: int, within_s: float) -> bool:
        """Whether the request of this number comes in time. Blocks until then."""
        with self._was_asked:
            return self._was_asked.wait_for(lambda: len(self.asked) >= number, within_s)

    def _script(self, number: int, body: dict[str, Any]) -> Any:
        with self._was_asked:
            self.asked.append(str(body["messages"]))
            self._was_asked.notify_all()
        return None if self._fault is None else self._fault(number, body)

    def _serve(self) -> None:
        async def serve() -> None:
            async with running(self._config, script=self._script) as simulator:
                self.url = simulator.url
                self._listening.set()
                await self._ended.wait()

        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(serve())


@contextmanager
def serving(fault: Faults | None = None, **config: Any) -> Iterator[Server]:
    """A simulated server for the block."""
    with Server(SimulatorConfig(**config), fault) as server:
        yield server


@pytest.fixture
def server() -> Iterator[Server]:
    """A simulated server without faults."""
    with serving() as started:
        yield started


def pairs(number: int, first: int = 0) -> list[dict[str, Any]]:
    """Seeds, all different."""
    return [
        {"id": f"s{n}", "instruction": f"Who kept lighthouse {n}?", "answer": f"Keeper number {n * 7919}."}
        for n in range(first, first + number)
    ]


def arguments(out: Path, *servers: Server, **more: Any) -> dict[str, Any]:
    """Arguments for a quick run."""
    overrides = {**QUICK, **more.pop("overrides", {})}
    urls = [server.url for server in servers]
    return {"out": out, "servers": urls, "overrides": overrides, "preflight": False, **more}


@pytest.fixture
def seeds(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a file of seeds."""

    def written(number: int) -> Path:
        path = tmp_path / "seeds.jsonl"
        path.write_bytes(b"\n".join(map(orjson.dumps, pairs(number))))
        return path

    return written


@pytest.fixture
def may_block(_no_blocking_calls: BlockBuster) -> None:
    """For tests of what blocks an event loop on purpose."""
    _no_blocking_calls.deactivate()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A run leaves no thread behind."""
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert set() == {name for name in left if name.startswith("streamsyn") or name == "simulator"}
