"""A route that generates text or scores it, faults included: one request from its body to its last byte."""

import asyncio
from typing import Any, Protocol

import orjson

from streamsyn.simulator import protocol
from streamsyn.simulator.completion_request import (
    Answer,
    CompletionRequest,
    Malformed,
    Refused,
    check_request,
)
from streamsyn.simulator.engine import DuplicateRid, QueueFull, ServerLost
from streamsyn.simulator.native import UnknownField
from streamsyn.simulator.protocol import EventStream, RawRequest, ResponseWriter
from streamsyn.simulator.settings import BAD_CONTENT, PAUSE_S, Fault
from streamsyn.simulator.simulation import Simulation


class Dialect(Protocol):
    """How one of the two generation routes parses a body and formats its answers."""

    def parse(self, body: dict[str, Any], rid: str) -> CompletionRequest: ...
    def refusal(self, message: str) -> protocol.Reply: ...
    def whole(self, request: CompletionRequest, answer: Answer) -> dict[str, Any]: ...
    def piece(self, request: CompletionRequest, so_far: str, piece: str) -> bytes: ...
    def last(self, request: CompletionRequest, answer: Answer) -> bytes: ...


class Generation:
    """A route that generates or scores, with injected faults.

    Args:
        simulation: The simulated server.
        dialect: Parses and formats for this route.
        json_only: Refuse content types other than application/json, as the OpenAI routes do.
    """

    def __init__(self, simulation: Simulation, dialect: Dialect, *, json_only: bool) -> None:
        self._simulation = simulation
        self._dialect = dialect
        self._json_only = json_only

    async def serve(self, raw: RawRequest, writer: ResponseWriter) -> None:
        """Answer one request."""
        simulation = self._simulation
        try:
            if self._json_only and not raw.content_type.lower().startswith(protocol.JSON):
                raise Malformed("Unsupported Media Type: Only 'application/json' is allowed")
            body = protocol.read_object(raw.body)
        except Malformed as error:
            await writer.send(protocol.malformed(str(error)))
            return
        if not simulation.arrive():
            writer.reset()
            return
        fault = simulation.faults.decide(simulation.stats.requests, body)
        try:
            await self._answer(body, fault, writer)
        except ServerLost:
            simulation.stats.disconnected += 1
            writer.reset()
        except ConnectionError:  # the client disconnected during the answer
            simulation.stats.disconnected += 1
        except asyncio.CancelledError:
            simulation.stats.disconnected += 1
            raise
        finally:
            simulation.stats.in_flight -= 1

    async def _answer(self, body: dict[str, Any], fault: Fault | None, writer: ResponseWriter) -> None:
        try:
            request = check_request(
                self._dialect.parse(body, self._simulation.new_rid()), self._simulation.config
            )
            await self._respond(request, self._counted(fault, request), writer)
        except Malformed as error:
            await writer.send(protocol.malformed(str(error)))
        except UnknownField as error:
            await writer.send(protocol.reply({"error": str(error)}, 400))
        except Refused as error:
            await writer.send(self._dialect.refusal(str(error)))

    def _counted(self, fault: Fault | None, request: CompletionRequest) -> Fault | None:
        if fault is None or (request.max_tokens == 0 and fault in BAD_CONTENT):
            return None  # there is no content to spoil
        self._simulation.stats.faults[fault] += 1
        return fault

    async def _respond(self, request: CompletionRequest, fault: Fault | None, writer: ResponseWriter) -> None:
        match fault:
            case Fault.RESET:
                writer.reset()
            case Fault.RATE_LIMIT:
                await writer.send(protocol.rate_limited())
            case Fault.PAUSE:
                await writer.send(protocol.rate_limited(PAUSE_S))
            case Fault.HTTP_500:
                await writer.send(protocol.internal_error())
            case Fault.REFUSE:
                await writer.send(self._dialect.refusal("The simulator refuses this request."))
            case Fault.QUEUE_FULL if not request.stream:
                await writer.send(protocol.queue_full())
            case _ if request.stream:
                await self._stream(request, fault, writer)
            case _:
                await self._whole(request, fault, writer)

    async def _whole(self, request: CompletionRequest, fault: Fault | None, writer: ResponseWriter) -> None:
        try:
            answer = await self._simulation.answer(request, fault)
        except QueueFull:
            await writer.send(protocol.queue_full())
            return
        except DuplicateRid:
            raise Refused(f"Duplicate request ID detected: {request.rid}") from None
        if fault is Fault.ERROR_IN_200:
            error = protocol.error("Internal server error: simulated", "InternalServerError", 500)
            await writer.send(protocol.reply(error))
            return
        body = orjson.dumps(self._dialect.whole(request, answer))
        if fault is Fault.BAD_JSON:
            await writer.send(protocol.Reply(200, body[: len(body) // 2], protocol.JSON))
        elif fault is Fault.CUT_BODY:
            await writer.cut(protocol.Reply(200, body, protocol.JSON))
        else:
            await writer.send(protocol.Reply(200, body, protocol.JSON))
            self._simulation.sent(answer)

    async def _stream(self, request: CompletionRequest, fault: Fault | None, writer: ResponseWriter) -> None:
        events = EventStream(writer, self._dialect, request, cut=fault is Fault.CUT_BODY)
        try:
            if fault is Fault.QUEUE_FULL:
                raise QueueFull
            answer = await self._simulation.answer(request, fault, events.feed)
        except QueueFull:
            await events.fail(protocol.QUEUE_FULL, "SERVICE_UNAVAILABLE", 503)
            return
        except DuplicateRid:
            raise Refused(f"Duplicate request ID detected: {request.rid}") from None
        if fault is Fault.ERROR_IN_200:
            await events.fail("Internal server error: simulated", "INTERNAL_SERVER_ERROR", 500)
        elif fault is Fault.BAD_JSON:
            await events.finish(b'data: {"id": "\n\n')
        else:
            await events.finish(self._dialect.last(request, answer))
            if fault is not Fault.CUT_BODY:
                self._simulation.sent(answer)
