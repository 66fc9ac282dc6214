"""Signals: which ones stop a run, and which of them stop it at once."""

import asyncio
import signal
from typing import cast

import pytest

from streamsyn.errors import StoppedEarly
from streamsyn.pipeline.stages import Pipeline
from streamsyn.pipeline.stop import Stopper
from streamsyn.stop_signals import stop_signals


class Stages:
    """Notes what a pipeline is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def drain(self, why: str) -> None:
        """Drain."""
        self.told.append(f"drain: {why}")

    def cancel(self, why: str) -> None:
        """Cancel."""
        self.told.append(f"cancel: {why}")


async def told_after(*numbers: signal.Signals) -> list[str]:
    """What a pipeline is told when these signals arrive one after the other."""
    stopper, stages = Stopper(), Stages()
    stopper.pipeline = cast("Pipeline", stages)
    with stopper.stopping(signals=True):
        for number in numbers:
            signal.raise_signal(number)
            for _ in range(10):  # through the loop's own socket, then its queue
                await asyncio.sleep(0)
    return stages.told


@pytest.mark.usefixtures("signals_are_caught")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
async def test_the_first_signal_drains(number: signal.Signals) -> None:
    assert await told_after(number) == [f"drain: stopped by {number.name}"]


@pytest.mark.usefixtures("signals_are_caught")
async def test_a_second_signal_cancels_unless_the_terminal_or_slurm_sent_it() -> None:
    """A terminal that closes sends SIGHUP twice: from the kernel and from the shell."""
    again = [signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1]
    assert await told_after(*again) == ["drain: stopped by SIGHUP"]
    assert (await told_after(*again, signal.SIGTERM))[1:] == ["cancel: stopped by SIGTERM"]


@pytest.mark.usefixtures("signals_are_caught")
async def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert await told_after(signal.SIGHUP) == []
    assert signal.SIGHUP not in stop_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("signals_are_caught")
async def test_a_signal_during_the_set_up_ends_it() -> None:
    async def set_up() -> None:
        with Stopper().stopping(signals=True):
            signal.raise_signal(signal.SIGUSR1)
            await asyncio.get_running_loop().create_future()

    with pytest.raises(StoppedEarly, match="SIGUSR1"):
        await set_up()
