"""`GET /v1/runs/ID/{samples,contexts,rejects}`: the rows of a run as a stream, from any row on."""

from functools import partial
from typing import Final

from aiohttp import web

from streamsyn.daemon.daemon import DAEMON
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, boolean, integer
from streamsyn.daemon.row_stream import RowStream
from streamsyn.daemon.run_routes import requested_run
from streamsyn.daemon.tail import Coding, Framing, Position, RowForm
from streamsyn.sink.shards import KINDS

LARGEST_SEQ: Final = 2**53
"""JavaScript's clients have no larger integers."""
_NDJSON: Final = "application/x-ndjson"
_EVENTS: Final = "text/event-stream"
_CODINGS: Final[tuple[Coding, ...]] = ("zstd", "gzip")
"""In the order of preference."""


async def stream_rows(request: web.Request, kind: str) -> web.StreamResponse:
    """Send rows of a kind, from where the request says."""
    run = await requested_run(request)
    form = RowForm(_framing(request), _coding(request))
    follow = boolean(request, "follow")
    limit = integer(request, "limit", 0, least=1, most=LARGEST_SEQ) or None
    after = _after(request)
    if (name := request.query.get("consumer")) is not None:
        consumer = await run.consumers.get(name)
        if consumer.kind != kind:
            raise Problem(409, f"consumer {name!r} reads {consumer.kind}, not {kind}")
        after = consumer.acked if after is None else after
    at = Position(0 if after is None else after + 1)
    if request.app[DAEMON].hosting.streams.is_closed:
        raise Problem(503, "the daemon is ending; connect again")
    async with run.tails.reading(kind) as tail:
        if not (follow or run.state == "finished"):  # end with the rows there are now
            there = max(0, tail.rows - at.seq)
            limit = there if limit is None else min(limit, there)
        sender = RowStream(request, tail, form, lambda: run.state == "finished")
        return await sender.send(at, limit=limit, follow=follow)


def _after(request: web.Request) -> int | None:
    """The `seq` of the last row that the client has; None to begin with the first.

    A client of server-sent events that connects again says so in a header, with the URL as it was.
    """
    text = request.headers.get("Last-Event-ID", "")
    if text.isascii() and text.isdigit() and len(text) <= 16:
        return int(text)
    if "after" not in request.query:
        return None
    return integer(request, "after", -1, least=-1, most=LARGEST_SEQ)


def _framing(request: web.Request) -> Framing:
    """What the client accepts: NDJSON, unless it asks for events."""
    accept = _accepted(request, "Accept")
    if accept.get(_EVENTS, 0) > accept.get(_NDJSON, 0):
        return "sse"
    if not accept or any(accept.get(one, 0) for one in (_NDJSON, "application/*", "*/*")):
        return "ndjson"
    raise Problem(406, f"rows are sent as {_NDJSON} or {_EVENTS}; set the header Accept to one of them")


def _coding(request: web.Request) -> Coding:
    accept = _accepted(request, "Accept-Encoding")
    weights = {"zstd": accept.get("zstd", 0), "gzip": accept.get("gzip", accept.get("*", 0))}
    best = max(_CODINGS, key=lambda coding: weights[coding])
    return best if weights[best] > 0 and weights[best] >= accept.get("identity", 0) else "identity"


def _accepted(request: web.Request, header: str) -> dict[str, float]:
    """The values of a header of preferences with their weights (RFC 9110, 12.4.2)."""
    found: dict[str, float] = {}
    for part in ",".join(request.headers.getall(header, ())).split(","):
        value, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = 1.0
        for name, _, text in (one.partition("=") for one in parameters):
            if name == "q":
                try:
                    weight = float(text)
                except ValueError:
                    weight = 0.0
        if value:
            found[value] = weight
    return found


ROUTES: Final = tuple(
    Route(
        method="GET",
        path=f"/v1/runs/{{id}}/{kind}",
        handler=partial(stream_rows, kind=kind),
        scope="read",
        summary=f"Stream the {kind} of a run as NDJSON or server-sent events.",
        answers={200: f"{_NDJSON}, {_EVENTS}"},
        problems=(404, 406, 409, 410, 503, 507),
        headers=("Last-Event-ID",),
        query={"after": int, "follow": bool, "limit": int, "consumer": str},
    )
    for kind in sorted(KINDS)
)
