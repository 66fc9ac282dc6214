"""`/v1/servers`: the servers and what each does; they are added, drained and removed while requests run."""

import re
from typing import Annotated, Any, Final, Literal

from aiohttp import web
from pydantic import Field

from streamsyn.daemon.bodies import JsonBody, json_body
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, json_response
from streamsyn.plain_text import without_userinfo

_OWN_KEYS: Final = "STREAMSYN_"
"""Environment variables that a client may name begin with this."""


class NewServer(JsonBody):
    """A server to add.

    `url` has no user, password or key: keys come from the environment variable `key_env` of the daemon.
    """

    url: Annotated[str, Field(max_length=2048)]
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    key_env: Annotated[str, Field(max_length=256)] | None = None


class ServerStatus(JsonBody):
    """A server and what it does.

    `queue` counts requests that wait for this server; `cached_share` and `planned_share` are shares of the
    prompt tokens, null before any answer; `tokens_per_s` is as the server reports, null if it does not;
    `failures` counts failed tries; `error` is the last failure of a server that gets no requests.
    """

    name: str
    url: str
    state: Literal["usable", "starting", "ejected", "draining", "removing"]
    model: str
    weight: float
    in_flight: int
    cap: int
    queue: int
    completions: int
    failures: int
    cached_share: float | None
    planned_share: float | None
    tokens_per_s: float | None
    error: str | None


class ServerList(JsonBody):
    """All servers."""

    data: list[ServerStatus]


async def list_servers(request: web.Request) -> web.Response:
    """Return all servers."""
    return json_response({"data": server_statuses(request.app[DAEMON])})


async def add_server(request: web.Request) -> web.Response:
    """Add a server, or use one again that was drained."""
    daemon = request.app[DAEMON]
    new = await json_body(request, NewServer)
    if without_userinfo(new.url) != new.url:
        raise Problem(
            422, "url: give no user, password or key; set key_env to an environment variable of the daemon"
        )
    if new.key_env is not None and not new.key_env.startswith(_OWN_KEYS):
        raise Problem(403, f"key_env: the name must begin with {_OWN_KEYS} (got {new.key_env!r})")
    known = {server["server"] for server in daemon.hosting.servers.describe()}
    url = await daemon.hosting.servers.add(new.url, new.weight, new.key_env)
    status = _status_of(daemon, url)
    location = {"Location": f"/v1/servers/{status['name']}"}
    return json_response(status, 200 if url in known else 201, location)


async def remove_server(request: web.Request) -> web.Response:
    """Send a server no new requests, and forget it when it has answered those it has."""
    daemon = request.app[DAEMON]
    await daemon.hosting.servers.remove(_requested_url(request))
    return web.Response(status=204)


async def drain_server(request: web.Request) -> web.Response:
    """Send a server no new requests, until it is added again."""
    daemon = request.app[DAEMON]
    url = _requested_url(request)
    await daemon.hosting.servers.drain(url)
    return json_response(_status_of(daemon, url), 202)


def server_statuses(daemon: Daemon) -> list[dict[str, Any]]:
    """Return each server as the API shows it."""
    return [_as_json(metrics) for metrics in daemon.hosting.servers.describe()]


def server_name(url: str) -> str:
    """Return the name of a server in paths: its URL without the scheme, each `/` as `_`."""
    return re.sub(r"[^A-Za-z0-9.:\[\]-]", "_", url.split("://", 1)[1])


def _as_json(metrics: dict[str, Any]) -> dict[str, Any]:
    prompt = metrics["prompt_tokens"]
    return {
        "name": server_name(metrics["server"]),
        "url": metrics["server"],
        "state": metrics["state"],
        "model": metrics["model"],
        "weight": metrics["weight"],
        "in_flight": metrics["in_flight"],
        "cap": metrics["cap"],
        "queue": metrics["queued"],
        "completions": metrics["completions"],
        "failures": metrics["failures"],
        "cached_share": metrics["cached_tokens"] / prompt if prompt else None,
        "planned_share": metrics["planned_cached_tokens"] / prompt if prompt else None,
        "tokens_per_s": metrics["generated_per_s"],
        "error": metrics["error"],
    }


def _status_of(daemon: Daemon, url: str) -> dict[str, Any]:
    """Return one server as the API shows it.

    Raises:
        Problem: 404: it has gone.
    """
    for metrics in daemon.hosting.servers.describe():
        if metrics["server"] == url:
            return _as_json(metrics)
    raise Problem(404, f"there is no server {url}")


def _requested_url(request: web.Request) -> str:
    """Return the URL of the server that the path of a request names, by its name or its whole URL.

    Raises:
        Problem: 404: there is none; 409: there are several with this name.
    """
    name = request.match_info["name"]
    urls: list[str] = [server["server"] for server in request.app[DAEMON].hosting.servers.describe()]
    found = [url for url in urls if name in (url, server_name(url))]
    if not found:
        names = ", ".join(map(server_name, urls[:20])) or "none"
        raise Problem(404, f"there is no server {name[:200]!r}; there are: {names}")
    if len(found) > 1:
        raise Problem(409, f"several servers are named {name}: use the URL, percent-encoded, in its place")
    return found[0]


ROUTES: Final = (
    Route(
        method="GET",
        path="/v1/servers",
        handler=list_servers,
        scope="read",
        summary="List the servers and what each does.",
        answers={200: ServerList},
    ),
    Route(
        method="POST",
        path="/v1/servers",
        handler=add_server,
        scope="admin",
        summary="Add a server, or use one again that was drained or removed. It is kept across restarts.",
        body=NewServer,
        answers={200: ServerStatus, 201: ServerStatus},
        problems=(403, 507),
    ),
    Route(
        method="DELETE",
        path="/v1/servers/{name}",
        handler=remove_server,
        scope="admin",
        summary="Remove a server; requests that it has are finished.",
        answers={204: None},
        problems=(404, 409, 507),
    ),
    Route(
        method="POST",
        path="/v1/servers/{name}/drain",
        handler=drain_server,
        scope="admin",
        summary="Send a server no new requests, until it is added again.",
        answers={202: ServerStatus},
        problems=(404, 409, 507),
    ),
)
