"""What systemd is told, read from a real socket."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from streamsyn.daemon.serve import Systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The address in NOTIFY_SOCKET, and the socket of the service manager."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name if request.param == "path" else f"\0{name}")
        listening.settimeout(10)
        yield (name if request.param == "path" else f"@{name}"), listening


def told(listening: socket.socket) -> list[str]:
    return listening.recv(4096).decode().splitlines()


def test_each_change_is_told(manager: tuple[str, socket.socket]) -> None:
    """In the order in which they come; a status is one line."""
    address, listening = manager
    systemd = Systemd({"NOTIFY_SOCKET": address})
    systemd.ready("serving\n2 runs")
    systemd.status("low disk")
    systemd.reloading()
    systemd.stopping(60.0)

    assert ["READY=1", "STATUS=serving 2 runs"] == told(listening)
    assert ["STATUS=low disk"] == told(listening)
    reloading, since = told(listening)
    assert "RELOADING=1" == reloading
    assert int(since.removeprefix("MONOTONIC_USEC=")) > 0
    assert ["STOPPING=1", "EXTEND_TIMEOUT_USEC=60000000"] == told(listening)


async def test_the_watchdog_hears_from_the_event_loop(manager: tuple[str, socket.socket]) -> None:
    """Twice within its time."""
    address, listening = manager
    systemd = Systemd({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())})
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(systemd.watch(), name="watchdog")
        heard = [await asyncio.to_thread(told, listening) for _ in range(3)]
        watching.cancel()

    assert 0.02 == systemd.watchdog_s
    assert [["WATCHDOG=1"]] * 3 == heard
    assert loop.time() - begun >= 0.018


@pytest.mark.parametrize(
    "environ", [{}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}]
)
async def test_nothing_is_watched_without_a_watchdog(environ: dict[str, str]) -> None:
    """Or with that of a different process."""
    systemd = Systemd(environ)
    await systemd.watch()
    systemd.ready("nobody hears it")

    assert None is systemd.watchdog_s


def test_a_socket_that_is_gone_is_logged(tmp_path: Path) -> None:
    """The daemon goes on."""
    with capture_logs() as logs:
        Systemd({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("serving")

    assert ["systemd.not_told"] == [line["event"] for line in logs]
