"""The life of the daemon's process: check, open ROOT, listen, reload, drain, end.

systemd is told how the daemon is doing: ready, reloading, ending, alive. Source: sd_notify(3). Use
`Type=notify` (or `notify-reload`) and `WatchdogSec=` in the unit. Without systemd nothing is sent.
"""

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from streamsyn.background import background
from streamsyn.config.command_sections import ServeSection
from streamsyn.config.loading import Config
from streamsyn.daemon.access import is_loopback
from streamsyn.daemon.daemon import Daemon, open_daemon
from streamsyn.daemon.http_app import CONNECTIONS, make_http_app
from streamsyn.errors import ConfigError, root_cause
from streamsyn.io.process_files import raise_limit

log = structlog.get_logger()

_MAX_HEADERS: Final = 128
_TLS_HANDSHAKE_S: Final = 10.0
_END_S: Final = 5.0
"""Seconds that answers in progress have to end when the daemon ends."""
_LINGER_S: Final = 1.0
"""Seconds that the rest of a refused body is read and dropped, so that the client can read the answer."""
_THREADS: Final = 32
"""For blocking calls. Most wait for the disk: requests that wait together share a sync."""
_BACKLOG: Final = 1024
RELOADED: Final = {
    "serve": (
        "tokens_file",
        "max_body_bytes",
        "max_line_bytes",
        "max_connections",
        "requests_per_s",
        "body_timeout_s",
        "max_unread_seeds",
        "allow_recipes",
        "allow_private_webhooks",
        "min_free_bytes",
        "retain_s",
        "retain_bytes",
    ),
    "run": ("drain_timeout_s",),
}
"""The keys that take effect without a restart, by section."""
_BEATS_A_PERIOD: Final = 2
"""systemd recommends to report twice within the time after which it kills."""


def serve(root: Path, load: Callable[[], Config]) -> None:
    """Serve ROOT until a signal: the first SIGTERM or SIGINT drains, a second one ends at once.

    Args:
        root: ROOT.
        load: Loads the configuration; SIGHUP loads it again.

    Raises:
        ConfigError: ROOT, the configuration or the address cannot be used.
        SinkError: The disk failed.
    """
    raise_limit()
    try:
        asyncio.run(_serve(root, load))
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


async def _serve(root: Path, load: Callable[[], Config]) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "blocking"))
    config = await asyncio.to_thread(load)
    check_address(config.serve)
    address = await asyncio.to_thread(bound, config.serve)  # first of all: no run begins if it is taken
    signals, systemd = Signals(), Systemd()
    with closing(address.socket), signals.handled():
        async with (
            open_daemon(root, config) as daemon,
            listening(daemon, address) as url,
            background() as tasks,
        ):
            serving = f"serving {root} at {url}"
            log.info("daemon.listening", plain=serving, url=url, root=str(root))
            systemd.ready(serving)
            tasks.start(systemd.watch(), name="watchdog")
            tasks.start(
                _reload_at(signals, daemon, load, partial(check_reloaded, address), systemd, serving),
                name="reload",
            )
            await signals.gently.wait()
            timeout_s = daemon.config.run.drain_timeout_s
            log.info("daemon.draining", timeout_s=timeout_s)
            systemd.stopping(timeout_s + 2 * _END_S)
            tasks.start(_end_at_once(daemon, signals), name="second signal")
            await daemon.drain()
    log.info("daemon.ended")


async def _reload_at(
    signals: "Signals",
    daemon: Daemon,
    load: Callable[[], Config],
    check: Callable[[ServeSection], None],
    systemd: "Systemd",
    serving: str,
) -> None:
    while True:
        await signals.reload.wait()
        signals.reload.clear()
        systemd.reloading()
        await reload(daemon, load, check)
        systemd.ready(serving)


async def _end_at_once(daemon: Daemon, signals: "Signals") -> None:
    await signals.at_once.wait()
    await daemon.stop_runs("stopped by a second signal", 0.0)


class Signals:
    """What signals ask of the daemon.

    Attributes:
        gently: To end: set by the first SIGTERM or SIGINT.
        at_once: To end at once: set by the second one.
        reload: To read its configuration again: set by SIGHUP.
    """

    def __init__(self) -> None:
        self.gently = asyncio.Event()
        self.at_once = asyncio.Event()
        self.reload = asyncio.Event()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals during the block."""
        loop = asyncio.get_running_loop()
        handlers = {
            signal.SIGTERM: self.end,
            signal.SIGINT: self.end,
            signal.SIGHUP: self.reload.set,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Ask the daemon to end; the second time at once."""
        (self.at_once if self.gently.is_set() else self.gently).set()


@dataclass(frozen=True, slots=True)
class Address:
    """An address that this process holds: `socket` is bound, and does not listen yet."""

    url: str
    socket: socket.socket
    tls: ssl.SSLContext | None


def bound(section: ServeSection) -> Address:
    """Bind the address to listen at, and load the certificate. Blocks.

    Raises:
        ConfigError: It cannot be bound, or the certificate cannot be used.
    """
    host, port = host_and_port(section.listen)
    tls = _tls(section)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"serve.listen: cannot listen at {section.listen}: {error.strerror or error}"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if tls is None else "https"
    return Address(f"{scheme}://{shown}:{listener.getsockname()[1]}", listener, tls)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record of aiohttp is to be logged: not malformed requests, quoted with their tokens."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


@asynccontextmanager
async def listening(daemon: Daemon, address: Address) -> AsyncIterator[str]:
    """Serve the daemon over HTTP at an address during the block; yields its URL."""
    section = daemon.config.serve
    app = make_http_app(daemon)
    server_logger.addFilter(_is_ours)  # only once, however often it is added
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=section.idle_timeout_s,
        shutdown_timeout=_END_S,
        max_headers=_MAX_HEADERS,
        lingering_time=_LINGER_S,
        auto_decompress=False,  # handlers do it, within limits
    )
    await runner.setup()
    try:
        assert runner.server is not None
        app[CONNECTIONS].server = runner.server
        listener = await asyncio.get_running_loop().create_server(
            app[CONNECTIONS],
            sock=address.socket,
            ssl=address.tls,
            ssl_handshake_timeout=None if address.tls is None else _TLS_HANDSHAKE_S,
            backlog=_BACKLOG,
        )
        try:
            yield address.url
        finally:
            listener.close()
    finally:
        daemon.hosting.streams.close()
        await runner.cleanup()


def check_address(section: ServeSection) -> None:
    """Refuse to listen where other machines can connect, without tokens.

    Raises:
        ConfigError: It would; or the address is not one.
    """
    host, _ = host_and_port(section.listen)
    if section.tokens_file is None and not is_loopback(host):
        raise ConfigError(
            f"serve.listen = {section.listen!r}: other machines can connect to this address, so "
            "serve.tokens_file must be set; or listen at 127.0.0.1"
        )
    if section.tls_key is not None and section.tls_certificate is None:
        raise ConfigError("serve.tls_key is set, but serve.tls_certificate is not")


def host_and_port(listen: str) -> tuple[str, int]:
    """Split `HOST:PORT`; an IPv6 address is in brackets.

    Raises:
        ConfigError: It is not an address.
    """
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"serve.listen = {listen!r}: write an IPv6 address in brackets: [::1]:8200")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"serve.listen = {listen!r}: expected HOST:PORT, such as 127.0.0.1:8200")
    return host, int(port)


def check_reloaded(address: Address, section: ServeSection) -> None:
    """Refuse what the daemon cannot go on with; use a certificate that was renewed. Blocks on the disk.

    Raises:
        ConfigError: As `check_address`, or the certificate cannot be used; the one before stays.
    """
    check_address(section)
    if address.tls is not None and section.tls_certificate is not None:
        _tls(section)  # in a context of its own: a failure half-way would spoil the one in use
        address.tls.load_cert_chain(section.tls_certificate, section.tls_key)


def _tls(section: ServeSection) -> ssl.SSLContext | None:
    if section.tls_certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(section.tls_certificate, section.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"serve.tls_certificate: cannot use {section.tls_certificate}: {error.strerror or error}"
        ) from error
    return context


async def reload(daemon: Daemon, load: Callable[[], Config], check: Callable[[ServeSection], None]) -> None:
    """Read the configuration, the tokens and the file of servers again.

    A mistake is logged, and everything stays as it was. Keys that changed and need a restart are logged.

    Args:
        daemon: The daemon.
        load: Loads the configuration as at the start.
        check: Raises a ConfigError if the daemon cannot go on with a section; may block.
    """
    before = daemon.config
    try:
        after = await asyncio.to_thread(load)
        merged = _merged(before, after)
        await asyncio.to_thread(check, merged.serve)
        await asyncio.to_thread(daemon.access.reload, merged.serve.tokens_file)
    except ConfigError as error:
        log.error("reload.failed", error=str(error), then="everything stays as it was")  # noqa: TRY400
        return
    daemon.hosting.config = merged
    await daemon.hosting.servers.rediscover()
    applied, late = changed_keys(before, merged), changed_keys(merged, after)
    log.info("reload.done", changed=applied, plain=f"reloaded: {', '.join(applied) or 'no key has changed'}")
    if late:
        plain = f"changed, but needs a restart: {', '.join(late)}"
        log.warning("reload.needs_restart", keys=late, plain=plain)


def changed_keys(one: Config, other: Config) -> list[str]:
    """The keys with different values; only their names, since a value may be a secret."""
    before, after = dict(_flat(one.model_dump())), dict(_flat(other.model_dump()))
    return sorted(key for key in {*before, *after} if before.get(key) != after.get(key))


def _merged(before: Config, after: Config) -> Config:
    """The configuration `before`, with the keys of `after` that need no restart."""
    sections = {}
    for name, keys in RELOADED.items():
        new = getattr(after, name)
        sections[name] = getattr(before, name).model_copy(update={key: getattr(new, key) for key in keys})
    return before.model_copy(update=sections)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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
