import asyncio
from typing import Any, Protocol

import orjson

from streamsyn.simulator import protocol
from streamsyn.simulator.ask import Answer, Ask, Malformed, Refused, check_length
from streamsyn.simulator.engine import DuplicateRid, QueueFull, ServerLost
from streamsyn.simulator.faults import BAD_CONTENT, Fault
from streamsyn.simulator.native import UnknownField
from streamsyn.simulator.protocol import Asked, EventStream, Line
from streamsyn.simulator.simulation import Simulation


class Dialect(Protocol):
    """One of the two routes that write: how it reads a body and words its answers."""

    def ask(self, body: dict[str, Any], rid: str) -> Ask: ...
    def refusal(self, message: str) -> protocol.Reply: ...
    def whole(self, ask: Ask, answer: Answer) -> dict[str, Any]: ...
    def piece(self, ask: Ask, so_far: str, piece: str) -> bytes: ...
    def last(self, ask: Ask, answer: Answer) -> bytes: ...


class Generation:
    """A route that writes or scores, with its faults.

    Args:
        simulation: What is asked.
        dialect: The route's words.
        json_only: Refuse what does not call itself application/json, as the OpenAI routes do.
    """

    def __init__(self, simulation: Simulation, dialect: Dialect, *, json_only: bool) -> None:
        self._simulation = simulation
        self._dialect = dialect
        self._json_only = json_only

    async def serve(self, asked: Asked, line: Line) -> None:
        """Answers one request on its line."""
        simulation = self._simulation
        try:
            if self._json_only and not asked.content_type.lower().startswith(protocol.JSON):
                raise Malformed("Unsupported Media Type: Only 'application/json' is allowed")
            body = protocol.read_object(asked.body)
        except Malformed as error:
            await line.send(protocol.malformed(str(error)))
            return
        if not simulation.arrive():
            line.reset()
            return
        fault = simulation.faults.decide(simulation.stats.requests, body)
        try:
            await self._answer(body, fault, line)
        except ServerLost:
            simulation.stats.disconnected += 1
            line.reset()
        except ConnectionError:  # the client left while its answer was being written
            simulation.stats.disconnected += 1
        except asyncio.CancelledError:
            simulation.stats.disconnected += 1
            raise
        finally:
            simulation.stats.in_flight -= 1

    async def _answer(self, body: dict[str, Any], fault: Fault | None, line: Line) -> None:
        try:
            ask = check_length(self._dialect.ask(body, self._simulation.new_rid()), self._simulation.config)
            await self._respond(ask, self._counted(fault, ask), line)
        except Malformed as error:
            await line.send(protocol.malformed(str(error)))
        except UnknownField as error:
            await line.send(protocol.reply({"error": str(error)}, 400))
        except Refused as error:
            await line.send(self._dialect.refusal(str(error)))

    def _counted(self, fault: Fault | None, ask: Ask) -> Fault | None:
        if fault is None or (ask.max_tokens == 0 and fault in BAD_CONTENT):
            return None  # nothing is written, so there is no content to spoil
        self._simulation.stats.faults[fault] += 1
        return fault

    async def _respond(self, ask: Ask, fault: Fault | None, line: Line) -> None:
        match fault:
            case Fault.RESET:
                line.reset()
            case Fault.HTTP_500:
                await line.send(protocol.internal_error())
            case Fault.REFUSE:
                await line.send(self._dialect.refusal("The simulator refuses this request."))
            case Fault.QUEUE_FULL if not ask.stream:
                await line.send(protocol.queue_full())
            case _ if ask.stream:
                await self._stream(ask, fault, line)
            case _:
                await self._whole(ask, fault, line)

    async def _whole(self, ask: Ask, fault: Fault | None, line: Line) -> None:
        try:
            answer = await self._simulation.answer(ask, fault)
        except QueueFull:
            await line.send(protocol.queue_full())
            return
        except DuplicateRid:
            raise Refused(f"Duplicate request ID detected: {ask.rid}") from None
        if fault is Fault.ERROR_IN_200:
            error = protocol.error("Internal server error: simulated", "InternalServerError", 500)
            await line.send(protocol.reply(error))
            return
        body = orjson.dumps(self._dialect.whole(ask, answer))
        if fault is Fault.BAD_JSON:
            await line.send(protocol.Reply(200, body[: len(body) // 2], protocol.JSON))
        elif fault is Fault.CUT_BODY:
            await line.cut(protocol.Reply(200, body, protocol.JSON))
        else:
            await line.send(protocol.Reply(200, body, protocol.JSON))
            self._simulation.sent(answer)

    async def _stream(self, ask: Ask, fault: Fault | None, line: Line) -> None:
        events = EventStream(line, self._dialect, ask, cut=fault is Fault.CUT_BODY)
        try:
            if fault is Fault.QUEUE_FULL:
                raise QueueFull
            answer = await self._simulation.answer(ask, fault, events.feed)
        except QueueFull:
            await events.fail(protocol.QUEUE_FULL, "SERVICE_UNAVAILABLE", 503)
            return
        except DuplicateRid:
            raise Refused(f"Duplicate request ID detected: {ask.rid}") from None
        if fault is Fault.ERROR_IN_200:
            await events.fail("Internal server error: simulated", "INTERNAL_SERVER_ERROR", 500)
        elif fault is Fault.BAD_JSON:
            await events.finish(b'data: {"id": "\n\n')
        else:
            await events.finish(self._dialect.last(ask, answer))
            if fault is not Fault.CUT_BODY:
                self._simulation.sent(answer)
