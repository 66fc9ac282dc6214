"""A transport that answers each route with bytes by hand."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport

ABSENT = Reply(404, b'{"detail":"Not Found"}')


class ScriptedTransport:
    """Answers by path, without its query; every path that is not listed with 404."""

    def __init__(self, replies: Mapping[str, Reply | Exception]) -> None:
        self.replies = replies

    async def exchange(self, method: str, path: str, **_: Any) -> Reply:
        """See Transport."""
        reply = self.replies.get(path.partition("?")[0], ABSENT)
        if isinstance(reply, Exception):
            raise reply
        return reply


class ScriptedServers:
    """Servers by URL, for `open_fleet`; `opened` are the specs that were connected to."""

    def __init__(self, replies: Mapping[str, Mapping[str, Reply | Exception]]) -> None:
        self.replies: dict[str, dict[str, Reply | Exception]] = {
            url: dict(routes) for url, routes in replies.items()
        }
        self.opened: list[ServerSpec] = []

    @asynccontextmanager
    async def connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        """Open a transport to a server."""
        self.opened.append(spec)
        yield ScriptedTransport(self.replies.setdefault(spec.url, {}))
