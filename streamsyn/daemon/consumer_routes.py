"""`/v1/runs/ID/consumers`: named consumers, whose position in the rows is kept here."""

from typing import Annotated, Any, Final, Literal

from aiohttp import web
from pydantic import Field

from streamsyn.daemon.bodies import JsonBody, json_body
from streamsyn.daemon.consumers import Consumer, ConsumerState
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.route import Route, checked_id, json_response
from streamsyn.daemon.run_routes import requested_run
from streamsyn.daemon.stream_routes import LARGEST_SEQ

Metric = Annotated[str, Field(min_length=1, max_length=64)]
Number = Annotated[float, Field(allow_inf_nan=False)]


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


_PATH: Final = "/v1/runs/{id}/consumers"
ROUTES: Final = (
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
