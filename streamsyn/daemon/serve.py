"""The life of the daemon's process: check, open ROOT, listen, wait for a signal, drain, end."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from streamsyn.background import background
from streamsyn.config.loading import Config
from streamsyn.config.serve_section import ServeSection
from streamsyn.daemon.access import is_loopback
from streamsyn.daemon.daemon import Daemon, open_daemon
from streamsyn.daemon.http_app import CONNECTIONS, make_http_app
from streamsyn.errors import ConfigError, root_cause
from streamsyn.io.open_files import raise_limit

log = structlog.get_logger()

_MAX_HEADERS: Final = 128
_TLS_HANDSHAKE_S: Final = 10.0
_END_S: Final = 5.0
"""Seconds that answers in progress have to end when the daemon ends."""
_BACKLOG: Final = 1024


def serve(root: Path, config: Config) -> None:
    """Serve ROOT until a signal: the first SIGTERM or SIGINT drains, a second one ends at once.

    Raises:
        ConfigError: ROOT, the configuration or the address cannot be used.
        SinkError: The disk failed.
    """
    raise_limit()
    try:
        asyncio.run(_serve(root, config))
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


async def _serve(root: Path, config: Config) -> None:
    check_address(config.serve)
    stopping = Stopping()
    with stopping.at_signals():
        async with open_daemon(root, config) as daemon, listening(daemon) as url:
            log.info("daemon.listening", plain=f"serving {root} at {url}", url=url, root=str(root))
            await stopping.gently.wait()
            log.info("daemon.draining", timeout_s=config.run.drain_timeout_s)
            async with background() as tasks:
                tasks.start(_end_at_once(daemon, stopping), name="second signal")
                await daemon.drain()
    log.info("daemon.ended")


async def _end_at_once(daemon: Daemon, stopping: "Stopping") -> None:
    await stopping.at_once.wait()
    await daemon.stop_runs("stopped by a second signal", 0.0)


class Stopping:
    """Why the daemon is to end.

    Attributes:
        gently: Set by the first signal.
        at_once: Set by the second one.
    """

    def __init__(self) -> None:
        self.gently = asyncio.Event()
        self.at_once = asyncio.Event()

    @contextmanager
    def at_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT during the block."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def ask(self) -> None:
        """Ask the daemon to end; the second time at once."""
        (self.at_once if self.gently.is_set() else self.gently).set()


@asynccontextmanager
async def listening(daemon: Daemon) -> AsyncIterator[str]:
    """Serve the daemon over HTTP during the block; yields its URL.

    Raises:
        ConfigError: It cannot listen at the address, or the certificate cannot be used.
    """
    section = daemon.config.serve
    host, port = host_and_port(section.listen)
    tls = await asyncio.to_thread(_tls, section)
    app = make_http_app(daemon)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=section.idle_timeout_s,
        shutdown_timeout=_END_S,
        max_headers=_MAX_HEADERS,
        auto_decompress=False,  # handlers do it, within limits
    )
    await runner.setup()
    try:
        assert runner.server is not None
        app[CONNECTIONS].server = runner.server
        try:
            listener = await asyncio.get_running_loop().create_server(
                app[CONNECTIONS],
                host,
                port,
                ssl=tls,
                ssl_handshake_timeout=_TLS_HANDSHAKE_S if tls else None,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise ConfigError(
                f"serve.listen: cannot listen at {section.listen}: {error.strerror or error}"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        port = listener.sockets[0].getsockname()[1]
        try:
            yield f"{'http' if tls is None else 'https'}://{shown}:{port}"
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
