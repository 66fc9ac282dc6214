"""Fixtures for all tests: nothing may block the event loop."""

import asyncio
import gc
import json
import os
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

import tests.examples  # noqa: F401 - registers the profiles

settings.load_profile("short")  # `make test-crash` loads "long"


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call made from a coroutine of ours fails the test; in a thread it is fine."""
    with blockbuster_ctx("streamsyn") as detector:
        yield detector


@pytest.fixture(autouse=True)
def _unconfigured_logs() -> Iterator[None]:
    """A command that a test runs in this process configures the logs for itself alone."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def signals_are_caught() -> Iterator[None]:
    """A signal that nothing handles fails the test. By default it would end this process with all its tests.

    None is ignored, even if the tests run under nohup.
    """
    lost: list[signal.Signals] = []
    before = {
        number: signal.signal(number, lambda number, _: lost.append(signal.Signals(number)))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    assert [] == lost


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files and folders that are synced, in their order."""
    paths: list[Path] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        paths.append(Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    return paths


@pytest_asyncio.fixture
async def no_task_left() -> AsyncIterator[None]:
    """What a test opened has closed all of its asyncio tasks when the test ends."""
    before = asyncio.all_tasks()
    yield
    left = {task.get_name() for task in asyncio.all_tasks() - before if not task.done()}
    assert set() == left - {asyncio.current_task().get_name()}  # type: ignore[union-attr]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports make a million objects that stay: looking for garbage among them takes seconds, each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


FOLDERS = {"real_sglang": ("real",), "chromium": ("report", "daemon")}  # where the Makefile looks for them


class OneServerEach(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Tests that share a real server go to one worker, those that share raylets to another."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        return f"{Path(path).parent}/{'launched' if 'launched' in name else 'shared'}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """How `make test-real` divides its tests. The others are divided by file."""
    return OneServerEach(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, by the seconds in tests/durations.json, so that the workers end together."""
    for item in items:
        for marker, folders in FOLDERS.items():
            if item.get_closest_marker(marker) and item.path.parent.name not in folders:
                raise pytest.UsageError(f"{item.nodeid}: {marker} tests belong into tests/{folders[0]}")
    seconds: dict[str, float] = json.loads((Path(__file__).parent / "durations.json").read_text())

    def longest_first(item: pytest.Item) -> float:
        return -seconds.get(str(item.path.relative_to(item.config.rootpath)), 0)

    items.sort(key=longest_first)
