import asyncio
import socket
import struct
from typing import Final

from aiohttp import web

from streamsyn.errors import ConfigError
from streamsyn.sglang.simulator.wire import Reply

LINGER_NOT: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset, not an orderly end."""
BACKLOG: Final = 4096


class HttpLine:
    """The way back over HTTP; `response` is what the web framework wants to have in the end."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse = web.Response()

    async def send(self, reply: Reply) -> None:
        headers = {"Content-Type": reply.content_type} if reply.content_type else None
        self.response = web.Response(status=reply.status, body=reply.body, headers=headers)
        await self.response.prepare(self._request)
        await self.response.write_eof()

    async def stream(self, data: bytes) -> None:
        await self._begin()
        await self.response.write(data)

    async def end(self) -> None:
        await self.response.write_eof()

    async def cut(self, reply: Reply | None = None) -> None:
        if reply is not None:
            self.response = web.StreamResponse(headers={"Content-Type": reply.content_type or ""})
            self.response.content_length = len(reply.body)
            await self.response.prepare(self._request)
            await self.response.write(reply.body[: len(reply.body) // 2])
        await self._begin()
        if self._request.transport is not None:
            self._request.transport.close()

    def reset(self) -> None:
        transport = self._request.transport
        if transport is not None and not transport.is_closing():
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
            transport.abort()

    async def _begin(self) -> None:
        if not self.response.prepared:
            headers = {"Content-Type": "text/event-stream; charset=utf-8"}
            self.response = web.StreamResponse(headers=headers)
            await self.response.prepare(self._request)


class Door:
    """The address that a server listens at; while it is shut, connections to it are refused.

    Args:
        runner: What serves the connections; it is set up.
        host: Where to listen.
        port: 0 picks a free one, which is kept.
    """

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self._host = host
        self.port = port
        self._listening: asyncio.Server | None = None

    async def open(self) -> None:
        """Listens.

        Raises:
            ConfigError: The address is taken, or is none of ours.
        """
        assert self._runner.server is not None
        try:
            self._listening = await asyncio.get_running_loop().create_server(
                self._runner.server, self._host, self.port, backlog=BACKLOG
            )
        except OSError as error:
            said = f"cannot listen at {self._host}:{self.port}: {error.strerror or error}"
            raise ConfigError(said) from error
        self.port = self._listening.sockets[0].getsockname()[1]

    def shut(self) -> None:
        """Listens no more; connections that exist live on."""
        if self._listening is None:
            return
        loop = asyncio.get_running_loop()
        for listener in self._listening.sockets:
            loop.remove_reader(listener.fileno())
        # A connection that was just accepted becomes one in this turn of the loop, and fails if its server
        # is closed by then.
        loop.call_soon(self._listening.close)
        self._listening = None
