"""The CPU time of simulated servers in the client's process."""

import asyncio
import time

import pytest

from streamsyn.simulator.cpu_time import CpuTime


def spin(seconds: float) -> None:
    """Keep the CPU busy."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        sum(range(100))


async def test_steps_count_and_what_runs_meanwhile_does_not() -> None:
    """A coroutine's own CPU time is counted; that of others while it waits is not."""
    cpu, may_go_on = CpuTime(), asyncio.Event()

    async def server() -> str:
        spin(0.01)
        await may_go_on.wait()
        spin(0.01)
        return "answer"

    async def client() -> None:
        spin(0.03)
        may_go_on.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(client(), name="client")
        answer = await cpu.of(server())

    assert "answer" == answer
    assert 0.02 <= cpu.seconds < 0.03


async def test_errors_and_cancellation_reach_the_coroutine() -> None:
    """What is raised goes both ways, as without counting."""
    cpu, seen = CpuTime(), list[str]()

    async def failing() -> None:
        raise ValueError("no")

    async def waiting() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(ValueError, match="no"):
        await cpu.of(failing())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await cpu.of(waiting())
    assert ["cancelled"] == seen
