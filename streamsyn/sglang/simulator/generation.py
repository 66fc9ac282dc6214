import asyncio
import socket
import struct
from typing import Any, Final, Protocol

import orjson
from aiohttp import web

from streamsyn.sglang.simulator import wire
from streamsyn.sglang.simulator.answers import Answer
from streamsyn.sglang.simulator.asks import Ask, Malformed, Refused, check_length
from streamsyn.sglang.simulator.chat import Chat
from streamsyn.sglang.simulator.engine import DuplicateRid, QueueFull
from streamsyn.sglang.simulator.faults import BAD_CONTENT, Fault
from streamsyn.sglang.simulator.native import Native, UnknownField
from streamsyn.sglang.simulator.simulation import Simulation
from streamsyn.sglang.simulator.stream import EventStream

LINGER_NOT: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset, not an orderly end."""


class Dialect(Protocol):
    """One of the two routes that write: how it reads a body and words its answers."""

    def ask(self, body: dict[str, Any], rid: str) -> Ask: ...
    def refusal(self, message: str) -> web.Response: ...
    def whole(self, ask: Ask, answer: Answer) -> dict[str, Any]: ...
    def piece(self, ask: Ask, so_far: str, piece: str) -> bytes: ...
    def last(self, ask: Ask, answer: Answer) -> bytes: ...


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body of `request`.

    Raises:
        Malformed: it is no JSON object.
    """
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise Malformed(f"body: JSON decode error: {error}") from None
    if not isinstance(body, dict):
        raise Malformed("body: Input should be a valid dictionary")
    return body


def reset(request: web.Request) -> web.Response:
    """Resets the connection before any byte of an answer."""
    transport = request.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        transport.abort()
    return web.Response()  # goes nowhere


class Generation:
    """The routes that write or score: chat completions and `/generate`, with their faults."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._chat = Chat()
        self._native = Native()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        if not request.headers.get("Content-Type", "").lower().startswith("application/json"):
            return wire.malformed("Unsupported Media Type: Only 'application/json' is allowed")
        return await self._serve(request, self._chat)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST and PUT /generate."""
        return await self._serve(request, self._native)

    async def _serve(self, request: web.Request, dialect: Dialect) -> web.StreamResponse:
        simulation = self._simulation
        try:
            body = await read_json(request)
        except Malformed as error:
            return wire.malformed(str(error))
        if not simulation.arrive():
            return reset(request)
        fault = simulation.faults.decide(simulation.stats.requests, body)
        try:
            ask = check_length(dialect.ask(body, simulation.new_rid()), simulation.config)
            return await self._respond(request, dialect, ask, self._counted(fault, ask))
        except Malformed as error:
            return wire.malformed(str(error))
        except UnknownField as error:
            return wire.reply({"error": str(error)}, 400)
        except Refused as error:
            return dialect.refusal(str(error))
        except ConnectionError:  # the client left while its answer was being written
            simulation.stats.disconnected += 1
            return web.Response()  # goes nowhere
        except asyncio.CancelledError:
            simulation.stats.disconnected += 1
            raise
        finally:
            simulation.stats.in_flight -= 1

    def _counted(self, fault: Fault | None, ask: Ask) -> Fault | None:
        if fault is None or (ask.max_tokens == 0 and fault in BAD_CONTENT):
            return None  # nothing is written, so there is no content to spoil
        self._simulation.stats.faults[fault] += 1
        return fault

    async def _respond(
        self, request: web.Request, dialect: Dialect, ask: Ask, fault: Fault | None
    ) -> web.StreamResponse:
        match fault:
            case Fault.RESET:
                return reset(request)
            case Fault.HTTP_500:
                return wire.internal_error()
            case Fault.REFUSE:
                return dialect.refusal("The simulator refuses this request.")
            case Fault.QUEUE_FULL if not ask.stream:
                return wire.queue_full()
            case _ if ask.stream:
                return await self._stream(request, dialect, ask, fault)
            case _:
                return await self._whole(request, dialect, ask, fault)

    async def _whole(
        self, request: web.Request, dialect: Dialect, ask: Ask, fault: Fault | None
    ) -> web.StreamResponse:
        try:
            answer = await self._simulation.answer(ask, fault)
        except QueueFull:
            return wire.queue_full()
        except DuplicateRid:
            raise Refused(f"Duplicate request ID detected: {ask.rid}") from None
        if fault is Fault.ERROR_IN_200:
            return wire.reply(wire.error("Internal server error: simulated", "InternalServerError", 500))
        body = orjson.dumps(dialect.whole(ask, answer))
        if fault is Fault.BAD_JSON:
            return web.Response(body=body[: len(body) // 2], headers=wire.JSON_HEADERS)
        if fault is Fault.CUT_BODY:
            return await _cut(request, body)
        response = web.Response(body=body, headers=wire.JSON_HEADERS)
        await response.prepare(request)
        await response.write_eof()
        self._simulation.sent(answer)
        return response

    async def _stream(
        self, request: web.Request, dialect: Dialect, ask: Ask, fault: Fault | None
    ) -> web.StreamResponse:
        events = EventStream(request, dialect, ask, cut=fault is Fault.CUT_BODY)
        try:
            if fault is Fault.QUEUE_FULL:
                raise QueueFull
            answer = await self._simulation.answer(ask, fault, events.feed)
        except QueueFull:
            return await events.fail(wire.QUEUE_FULL, "SERVICE_UNAVAILABLE", 503)
        except DuplicateRid:
            raise Refused(f"Duplicate request ID detected: {ask.rid}") from None
        if fault is Fault.ERROR_IN_200:
            return await events.fail("Internal server error: simulated", "INTERNAL_SERVER_ERROR", 500)
        if fault is Fault.BAD_JSON:
            return await events.finish(b'data: {"id": "\n\n')
        response = await events.finish(dialect.last(ask, answer))
        if fault is not Fault.CUT_BODY:
            self._simulation.sent(answer)
        return response


async def _cut(request: web.Request, body: bytes) -> web.StreamResponse:
    """Promises the whole body, sends half and closes."""
    response = web.StreamResponse(headers=wire.JSON_HEADERS)
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response
