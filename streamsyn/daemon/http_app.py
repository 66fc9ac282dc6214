"""The daemon as an aiohttp application: the routes of all modules, and what is checked before them.

request -> id and errors -> access, rate -> handler
"""

import asyncio
import re
from collections.abc import Sequence
from time import monotonic
from typing import Final
from uuid import uuid4

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from streamsyn.daemon import (
    health_routes,
    openai_routes,
    page_routes,
    run_routes,
    seed_routes,
    server_routes,
    stream_routes,
)
from streamsyn.daemon.access import Connections, RateLimit
from streamsyn.daemon.bodies import LIMITS
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.openapi import openapi_route
from streamsyn.daemon.problems import Problem, problem_of, problem_response
from streamsyn.daemon.route import Route
from streamsyn.errors import StreamsynError

log = structlog.get_logger()

_ROUTES: Final[Sequence[Route]] = (
    *health_routes.ROUTES,
    *run_routes.ROUTES,
    *server_routes.ROUTES,
    *seed_routes.ROUTES,
    *stream_routes.ROUTES,
    *page_routes.ROUTES,
    *openai_routes.ROUTES,
)
ROUTES: Final[Sequence[Route]] = (*_ROUTES, openapi_route(_ROUTES))
"""All routes of the daemon."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_ID: Final = web.RequestKey("request_id", str)
CONNECTIONS: Final = web.AppKey("connections", Connections)
RATE_LIMIT: Final = web.AppKey("rate_limit", RateLimit)
SCOPES: Final = web.AppKey("scopes", dict)


def make_http_app(daemon: Daemon, routes: Sequence[Route] = ROUTES) -> web.Application:
    """Return the application. Whoever serves it sets the server of its `CONNECTIONS`."""
    app = web.Application(middlewares=[_answer_errors, _check_access])
    app[DAEMON] = daemon
    app[LIMITS] = lambda: daemon.config.serve
    app[CONNECTIONS] = Connections(app[LIMITS])
    app[RATE_LIMIT] = RateLimit(monotonic)
    app[SCOPES] = {}
    page_routes.set_up(app)
    for route in routes:
        if route.method == "GET":  # and HEAD
            added = app.router.add_get(route.path, route.handler)
        else:
            added = app.router.add_route(route.method, route.path, route.handler)
        app[SCOPES][added.handler, route.path] = route.scope
    app.on_response_prepare.append(_add_headers)
    return app


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id, and answer errors as problems: our own, aiohttp's, and bugs."""
    request.app[CONNECTIONS].spoke(request)
    given = request.headers.get("X-Request-Id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
    request[_ID] = request_id
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
    try:
        if request.method in _READING:
            return await handler(request)
        return await _to_its_end(request, handler)
    except web.HTTPException as answer:  # of aiohttp: no such path or method, for example
        if answer.status < 400:
            raise
        headers = {"Allow": answer.headers["Allow"]} if "Allow" in answer.headers else {}
        problem = Problem(answer.status, _detail(answer, request), headers=headers)
    except StreamsynError as error:
        problem = problem_of(error)
        if problem.status >= 500:
            log.warning("request.failed", method=request.method, path=request.path, error=str(error))
    except ConnectionError:
        raise  # the client has gone: nobody reads an answer
    except Exception as bug:
        log.exception("request.bug", method=request.method, path=request.path, bug=repr(bug))
        problem = Problem(500, f"internal error; the log has it under the request id {request_id}")
    response = problem_response(problem, request.path)
    if not request.content.is_eof():
        response.force_close()  # what follows may be the rest of the body, not a request
    return response


async def _to_its_end(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request that changes something: its handler goes on if the client hangs up meanwhile."""
    answer: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            check = request.app[DAEMON].hosting.epoch.check
            await asyncio.to_thread(check)
            response = await handler(request)
            # What is on disk at this check is there for whoever takes over; else nobody may act on it.
            await asyncio.to_thread(check)
            answer.set_result(response)
        except Exception as error:  # noqa: BLE001 - raised to the one who waits
            answer.set_exception(error)
        finally:
            answer.cancel()  # if this task was cancelled; otherwise it has a result

    if request.app[DAEMON].tasks.start(work(), name=f"{request.method} {request.path}", finish=True) is None:
        raise Problem(503, "the daemon is ending")
    try:
        return await asyncio.shield(answer)
    except asyncio.CancelledError:
        answer.add_done_callback(asyncio.Future.exception)  # nobody waits for it any more
        raise


@web.middleware
async def _check_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse clients without the scope that the route needs, and those that ask too often."""
    daemon = request.app[DAEMON]
    resource = request.match_info.route.resource
    route = (request.match_info.handler, "" if resource is None else resource.canonical)
    try:
        client = daemon.access.check(request, request.app[SCOPES].get(route, "read"))
    except Problem:
        _check_rate(request, f"refused {request.remote}")  # those who guess tokens
        raise
    _check_rate(request, client)
    return await handler(request)


def _check_rate(request: web.Request, client: str) -> None:
    """Refuse a client that asks too often.

    Raises:
        Problem: 429: it does.
    """
    per_s = request.app[DAEMON].config.serve.requests_per_s
    if wait_s := request.app[RATE_LIMIT].wait_s(client, per_s):
        raise Problem(
            429,
            f"too many requests; at most {per_s:g} per second are answered",
            headers={"Retry-After": str(max(1, round(wait_s)))},
        )


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if _ID in request:
        response.headers["X-Request-Id"] = request[_ID]


def _detail(answer: web.HTTPException, request: web.Request) -> str:
    match answer:
        case web.HTTPNotFound():
            return f"there is no {request.path[:200]!r}; /openapi.json lists what there is"
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(answer.allowed_methods))
            return f"{request.method[:20]} is not allowed here; allowed are {allowed}"
        case _:
            return answer.text or answer.reason
