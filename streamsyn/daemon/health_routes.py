"""`/healthz` and `/readyz`: whether the daemon is alive, and whether it can work."""

from typing import Final

from aiohttp import web

from streamsyn.daemon.bodies import JsonBody
from streamsyn.daemon.daemon import DAEMON
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, json_response


class Health(JsonBody):
    """The daemon is alive."""

    status: str


class Ready(JsonBody):
    """The daemon can work."""

    status: str


async def healthz(_request: web.Request) -> web.Response:
    """Answer as long as the event loop does."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Answer 503 while the daemon ends, and while no server can be used: then runs wait."""
    why = request.app[DAEMON].why_not_ready
    if why is not None:
        raise Problem(503, why)
    return json_response({"status": "ready"})


ROUTES: Final = (
    Route(
        method="GET",
        path="/healthz",
        handler=healthz,
        scope="open",
        summary="Whether the daemon is alive.",
        answers={200: Health},
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=readyz,
        scope="open",
        summary="Whether the daemon can work: it is not ending, and a server can be used.",
        answers={200: Ready},
        problems=(503,),
    ),
)
