"""What clients read: the rows of a run as a stream, from any row on, and named consumers of them.

The response of a stream that was cut off (the daemon shuts down, the run is deleted, the client is too slow)
has no proper end: the last chunk is missing, and server-sent events lack `event: end`. So a client knows that
it has to connect again, and asks for what comes after the last `seq` it has seen. A consumer's position in
the rows is kept here, for clients that do not keep it.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, Literal

import structlog
from aiohttp import web
from pydantic import Field

from streamsyn.daemon.bodies import JsonBody, json_body
from streamsyn.daemon.consumers import Consumer, ConsumerState
from streamsyn.daemon.daemon import DAEMON
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, boolean, checked_id, integer, json_response
from streamsyn.daemon.run_routes import requested_run
from streamsyn.daemon.tail import Coding, Encoded, Envelope, Framing, Position, RowForm, Tail
from streamsyn.errors import SinkError
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

HEARTBEAT_S: Final = 15.0
"""Seconds of silence after which an event stream gets a comment, and a client that has gone is noticed."""
WRITE_TIMEOUT_S: Final = 300.0
"""A client that takes nothing for this long is cut off."""
_SLICE_BYTES: Final = 256 * 2**10
"""Longer pieces (of long rows) are sent in slices: what a connection buffers does not depend on its rows."""
LARGEST_SEQ: Final = 2**53
"""JavaScript's clients have no larger integers."""
_NDJSON: Final = "application/x-ndjson"
_EVENTS: Final = "text/event-stream"
_CONTENT_TYPES: Final = {"ndjson": _NDJSON, "sse": _EVENTS}
_CODINGS: Final[tuple[Coding, ...]] = ("zstd", "gzip")
"""In the order of preference."""
_PATH: Final = "/v1/runs/{id}/consumers"

Metric = Annotated[str, Field(min_length=1, max_length=64)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class CutOff(Exception):
    """Raised when a stream ends before its rows do."""


class RowStream:
    """Sends the rows of a tail to one client.

    Args:
        request: The client's request.
        tail: The rows.
        form: How they are sent.
        has_ended: Whether the run has ended: there will be no more rows than there are.
    """

    def __init__(
        self, request: web.Request, tail: Tail, form: RowForm, has_ended: Callable[[], bool]
    ) -> None:
        self._request = request
        self._tail = tail
        self._form = form
        self._has_ended = has_ended
        self._loop = asyncio.get_running_loop()
        self._envelope = Envelope(form.coding)
        headers = {"Content-Type": _CONTENT_TYPES[form.framing], "Cache-Control": "no-store"}
        if form.coding != "identity":
            headers["Content-Encoding"] = form.coding
        self._response = web.StreamResponse(headers={**headers, "Vary": "Accept, Accept-Encoding"})

    async def send(self, at: Position, *, limit: int | None, follow: bool) -> web.StreamResponse:
        """Send rows from a position on; returns the response.

        Args:
            at: Where to begin.
            limit: Maximum number of rows.
            follow: Wait for more rows until the run has ended; otherwise end with the rows there are.

        Raises:
            SinkError: Rows cannot be read. After the first piece, this cuts the stream off.
        """
        await self._tail.piece(at, self._form, limit)  # an error can still be answered
        await self._response.prepare(self._request)
        if self._request.method == "HEAD":
            return self._response
        try:
            await self._write(self._envelope.begin())
            end = await self._send_rows(at, limit, follow=follow)
            if end is not None and self._form.framing == "sse":
                await self._send(self._form.text(b'event: end\ndata: {"rows":%d}\n\n' % end.seq))
            await self._write(self._envelope.end())
        except (CutOff, SinkError) as why:
            self._cut(str(why))
        except ConnectionError:  # the client has gone; it asks again if it wants more
            log.debug("stream.left", path=self._request.path)
        return self._response

    async def _send_rows(self, at: Position, limit: int | None, *, follow: bool) -> Position | None:
        """Send rows; returns the position after the last row of a run that has ended, else None."""
        tail = self._tail
        while limit is None or limit > 0:
            news, has_ended = tail.news, self._has_ended()  # before the rows: none is written after the end
            piece = await tail.piece(at, self._form, limit)
            if tail.is_closed:
                raise CutOff("the daemon is shutting down, or the run was deleted")
            if piece is not None:
                await self._send(piece.encoded)
                at = piece.next
                limit = None if limit is None else limit - piece.rows
            elif has_ended:
                return at
            elif follow:
                await self._wait(news)
            else:
                return None
        return None

    async def _wait(self, news: asyncio.Event) -> None:
        """Wait for news; in a long silence, send comments and look whether the client is still there."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await news.wait()
                    return
            except TimeoutError:
                transport = self._request.transport
                if transport is None or transport.is_closing():
                    raise ConnectionResetError from None
                if self._form.framing == "sse":
                    await self._send(self._form.text(b":\n\n"))

    async def _send(self, piece: Encoded) -> None:
        self._envelope.add(piece)
        await self._write(piece.body)

    async def _write(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE_BYTES):
            whole = len(data) <= _SLICE_BYTES
            timer = self._loop.call_later(WRITE_TIMEOUT_S, self._cut, "it took nothing for too long")
            try:
                await self._response.write(data if whole else data[start : start + _SLICE_BYTES])
            finally:
                timer.cancel()

    def _cut(self, why: str) -> None:
        """Drop the connection; a write in progress raises a ConnectionError."""
        log.info("stream.cut_off", path=self._request.path, why=why)
        if (transport := self._request.transport) is not None:
            transport.abort()


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


class NewConsumer(JsonBody):
    """What a consumer reads, and the `seq` of the last row that it needs no more."""

    kind: Literal["samples", "contexts", "rejects"] = "samples"
    after: Annotated[int, Field(ge=-1, le=LARGEST_SEQ)] | None = None


class Ack(JsonBody):
    """The consumer has done with all rows up to and including this one; -1 is before the first.

    `metrics` are numbers of its work that the page at `/` shows, such as {"loss": 1.93, "step": 300}.
    """

    seq: Annotated[int, Field(ge=-1, le=LARGEST_SEQ)]
    metrics: Annotated[dict[Metric, Number], Field(max_length=16)] | None = None


class ConsumerList(JsonBody):
    """The consumers of a run."""

    data: list[ConsumerState]


async def list_consumers(request: web.Request) -> web.Response:
    """List the consumers of a run."""
    run = await requested_run(request)
    consumers = await run.consumers.all()
    return json_response({"data": [await _shown(run, name, one) for name, one in consumers.items()]})


async def show_consumer(request: web.Request) -> web.Response:
    """Return a consumer."""
    run, name = await requested_run(request), request.match_info["name"]
    return json_response(await _shown(run, name, await run.consumers.get(name)))


async def put_consumer(request: web.Request) -> web.Response:
    """Create a consumer, or return the one that exists."""
    run, name = await requested_run(request), checked_id(request.match_info["name"], "consumer")
    new = await json_body(request, NewConsumer, is_optional=True)
    rows = await run.tails.rows(new.kind)
    consumer, is_new = await run.consumers.put(name, new.kind, new.after, rows)
    return json_response(consumer.as_json(name, rows), 201 if is_new else 200)


async def delete_consumer(request: web.Request) -> web.Response:
    """Delete a consumer: rows need not be kept for it any more."""
    run = await requested_run(request)
    await run.consumers.delete(request.match_info["name"])
    return web.Response(status=204)


async def acknowledge(request: web.Request) -> web.Response:
    """Move a consumer forward; one that is further already stays where it is."""
    run, name = await requested_run(request), request.match_info["name"]
    ack = await json_body(request, Ack)
    consumer = await run.consumers.get(name)
    rows = await run.tails.rows(consumer.kind)
    return json_response((await run.consumers.ack(name, ack.seq, rows, ack.metrics)).as_json(name, rows))


async def _shown(run: HostedRun, name: str, consumer: Consumer) -> dict[str, Any]:
    return consumer.as_json(name, await run.tails.rows(consumer.kind))


ROUTES: Final = (
    *(
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
    ),
    Route(
        method="GET",
        path=_PATH,
        handler=list_consumers,
        scope="read",
        summary="List the named consumers of a run.",
        answers={200: ConsumerList},
        problems=(404, 507),
    ),
    Route(
        method="GET",
        path=f"{_PATH}/{{name}}",
        handler=show_consumer,
        scope="read",
        summary="Return a consumer.",
        answers={200: ConsumerState},
        problems=(404, 507),
    ),
    Route(
        method="PUT",
        path=f"{_PATH}/{{name}}",
        handler=put_consumer,
        scope="write",
        summary="Create a consumer. One that exists with this kind is left as it is.",
        body=NewConsumer,
        answers={200: ConsumerState, 201: ConsumerState},
        problems=(404, 409, 507),
    ),
    Route(
        method="DELETE",
        path=f"{_PATH}/{{name}}",
        handler=delete_consumer,
        scope="write",
        summary="Delete a consumer: rows are not kept for it any more.",
        answers={204: None},
        problems=(404, 507),
    ),
    Route(
        method="POST",
        path=f"{_PATH}/{{name}}/ack",
        handler=acknowledge,
        scope="write",
        summary="Acknowledge all rows up to a seq. A consumer never moves back.",
        body=Ack,
        answers={200: ConsumerState},
        problems=(404, 409, 507),
    ),
)
