"""Asyncio tasks beside the main flow: they end with the block, one way or the other."""

import asyncio

import pytest

from streamsyn.background import background
from streamsyn.errors import root_cause


class Work:
    """Something that runs until it is told to end, and notes how it ended."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.began = asyncio.Event()
        self.ended = ""

    async def __call__(self) -> None:
        """Run."""
        self.began.set()
        self.ended = "cancelled"
        await self.may_end.wait()
        self.ended = "finished"


async def test_what_has_no_end_is_cancelled() -> None:
    """A probe goes on until the block ends, and no longer."""
    work = Work()
    async with asyncio.timeout(1), background() as tasks:
        tasks.start(work(), name="probe")
        await work.began.wait()
    assert "cancelled" == work.ended


async def test_what_has_an_end_is_waited_for() -> None:
    """An abort that is under way reaches its server."""
    work = Work()
    async with asyncio.timeout(1), background() as tasks:
        tasks.start(work(), name="abort", finish=True)
        await work.began.wait()
        asyncio.get_running_loop().call_soon(work.may_end.set)
    assert "finished" == work.ended


@pytest.mark.parametrize("how", ["error", "cancel"])
async def test_it_is_waited_for_when_the_block_fails(how: str) -> None:
    """Most of all then: that is when requests are aborted."""
    work = Work()

    async def block() -> None:
        async with background() as tasks:
            tasks.start(work(), name="abort", finish=True)
            await work.began.wait()
            asyncio.get_running_loop().call_later(0.01, work.may_end.set)
            if how == "error":
                raise KeyError("the block's own")
            running.cancel()
            await asyncio.Event().wait()

    running = asyncio.ensure_future(block())
    async with asyncio.timeout(1):
        await asyncio.wait([running])
    assert "finished" == work.ended
    assert (how == "cancel") is running.cancelled()
    if how == "error":
        assert isinstance(root_cause(running.exception() or Exception()), KeyError)


async def test_a_bug_ends_the_block() -> None:
    """It comes out of it, and what else ran there is cancelled."""
    work = Work()

    async def fail() -> None:
        await work.began.wait()
        raise KeyError("bug")

    async def block() -> None:
        async with asyncio.timeout(1), background() as tasks:
            tasks.start(work(), name="probe")
            tasks.start(fail(), name="broken")
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as raised:
        await block()
    assert ["KeyError"] == [type(error).__name__ for error in raised.value.exceptions]
    assert "cancelled" == work.ended


async def test_nothing_is_started_once_the_block_ends() -> None:
    """Neither after its end nor while a bug ends it: the bug alone comes out."""
    late = Work()

    async def fail() -> None:
        raise KeyError("bug")

    async def block() -> None:
        async with asyncio.timeout(1), background() as tasks:
            tasks.start(fail(), name="broken")
            try:
                await asyncio.Event().wait()
            finally:
                tasks.start(late(), name="abort", finish=True)

    with pytest.raises(BaseExceptionGroup) as raised:
        await block()
    await asyncio.sleep(0)
    assert not late.began.is_set()
    assert ["KeyError"] == [type(error).__name__ for error in raised.value.exceptions]
