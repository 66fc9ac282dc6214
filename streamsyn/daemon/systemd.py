"""Tells systemd how the daemon is doing: ready, reloading, ending, alive. Source: sd_notify(3).

Use `Type=notify` (or `notify-reload`) and `WatchdogSec=` in the unit. Without systemd nothing is sent.
"""

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

import structlog

log = structlog.get_logger()

_BEATS_A_PERIOD: Final = 2
"""systemd recommends to report twice within the time after which it kills."""


class Systemd:
    """The service manager, by the variables that it has set for this process.

    Args:
        environ: The environment: `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.

    Attributes:
        watchdog_s: Seconds without a sign of life after which the process is killed; None for no limit.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        is_watched = microseconds.isdecimal() and pid in {"", str(os.getpid())}
        self.watchdog_s = int(microseconds) / 1e6 if is_watched and int(microseconds) > 0 else None

    def ready(self, status: str) -> None:
        """The daemon serves, with a status line for `systemctl status`; also after a reload."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Change the status line."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends this."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, timeout_s: float) -> None:
        """The daemon is ending, and may take `timeout_s` seconds for it."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(timeout_s * 1e6)}")

    async def watch(self) -> None:
        """Give a sign of life as often as the watchdog wants it, from the event loop; until cancelled."""
        if self.watchdog_s is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / _BEATS_A_PERIOD)

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        # A leading @ stands for the zero byte of the abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        lines = "\n".join(line.replace("\n", " ") for line in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
                connection.setblocking(False)
                connection.connect(address)
                connection.send(lines.encode())
        except OSError as error:
            log.warning("systemd.not_told", error=error.strerror or str(error), message=assignments[0])
