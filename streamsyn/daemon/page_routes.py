"""`/`: the page, its files, and `/v1/events`, the states that it shows."""

import asyncio
from functools import partial
from importlib.resources import files
from typing import Final

from aiohttp import web

from streamsyn.daemon.daemon import DAEMON
from streamsyn.daemon.page_state import EVERY_S, PageState
from streamsyn.daemon.route import Route
from streamsyn.daemon.row_stream import WRITE_TIMEOUT_S

PAGE_STATE: Final = web.AppKey("page_state", PageState)

_HEADERS: Final = {
    # https://www.w3.org/TR/CSP3/ and https://www.w3.org/TR/trusted-types/: only these files, no inline code,
    # and no text that becomes HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES: Final = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
PAGE_FILES: Final = {
    path.name: path.read_bytes()
    for path in sorted((files("streamsyn.daemon") / "page").iterdir(), key=lambda path: path.name)
}


def set_up(app: web.Application) -> None:
    """Prepare the application: throughput is recorded from its start on."""
    daemon = app[DAEMON]
    app[PAGE_STATE] = PageState(daemon)

    async def start(app: web.Application) -> None:
        daemon.tasks.start(app[PAGE_STATE].record_throughput(), name="throughput")

    app.on_startup.append(start)


async def page_file(_request: web.Request, name: str) -> web.Response:
    """Return a file of the page."""
    return web.Response(
        body=PAGE_FILES[name], content_type=_media_type(name), charset="utf-8", headers=_HEADERS
    )


async def events(request: web.Request) -> web.StreamResponse:
    """Send a state every second until the client leaves or the daemon has ended its work."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    daemon, state = request.app[DAEMON], request.app[PAGE_STATE]
    clock = asyncio.get_running_loop().time
    with state.watched():
        while not daemon.has_ended:
            event = await state.event()
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(event)
            except TimeoutError:  # it takes nothing: what is buffered for it is dropped, too
                if request.transport is not None:
                    request.transport.abort()
                break
            await asyncio.sleep(EVERY_S - clock() % EVERY_S)
    return response


def _media_type(name: str) -> str:
    return _TYPES[name.rpartition(".")[2]]


ROUTES: Final = (
    *(
        Route(
            method="GET",
            path="/" if name == "index.html" else f"/page/{name}",
            handler=partial(page_file, name=name),
            scope="open",
            summary="The page." if name == "index.html" else f"A file of the page: {name}.",
            answers={200: _media_type(name)},
        )
        for name in PAGE_FILES
    ),
    Route(
        method="GET",
        path="/v1/events",
        handler=events,
        scope="read",
        summary="What the page shows, as server-sent events: one `state` every second.",
        answers={200: "text/event-stream"},
    ),
)
