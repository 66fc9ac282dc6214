"""How a running server is given other weights: what goes over the wire, and what comes back.

As SGLang 0.5.23 does it: a request in flight hears nothing while its server is paused, and new ones wait. The
update works at once on a server that is paused; elsewhere it would wait for all that runs. From then on the
server calls its model by the directory it read (see `wire.started_as`).
"""

from pathlib import Path
from typing import Literal, TypeAlias

import orjson

from streamsyn.errors import RequestRefused
from streamsyn.fleet import wire
from streamsyn.fleet.transport import Transport

PAUSE = "/pause_generation"
UPDATE = "/update_weights_from_disk"
CONTINUE = "/continue_generation"
CONTROL_TIMEOUT_S = 15.0

PauseMode: TypeAlias = Literal["retract", "in_place", "abort"]
"""What becomes of requests in flight: computed again from their tokens, held as they are, given up."""


async def pause(transport: Transport, url: str, mode: PauseMode, timeout_s: float) -> None:
    """Make the server hold still. With `abort` it answers once nothing runs any more.

    Raises:
        ServerError: It may be paused or not.
    """
    body = orjson.dumps({"mode": mode})
    reply = await transport.exchange("POST", PAUSE, body=body, timeout_s=timeout_s)
    wire.parse_object(reply.status, reply.body, url)


async def load_weights(
    transport: Transport, url: str, folder: Path, version: str, mode: PauseMode, timeout_s: float
) -> None:
    """Have a paused server read its weights from `folder`, an absolute path there.

    What is in its prefix cache was computed by the old weights and is dropped, except with `in_place`: there
    requests in flight go on with what they have, and the server would refuse.

    Raises:
        RequestRefused: It has not loaded them: it has its old weights.
        ServerError: It gave no answer.
    """
    body = {
        "model_path": str(folder),
        "weight_version": version,
        "abort_all_requests": False,
        "flush_cache": mode != "in_place",
    }
    reply = await transport.exchange("POST", UPDATE, body=orjson.dumps(body), timeout_s=timeout_s)
    answer = wire.parse_object(reply.status, reply.body, url)
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise RequestRefused(f"{url} says of {folder}: {answer!r:.200}")


async def resume(transport: Transport, url: str) -> None:
    """Let a paused server work again; nothing happens to another.

    Raises:
        ServerError: It may be paused still.
    """
    reply = await transport.exchange("POST", CONTINUE, body=b"{}", timeout_s=CONTROL_TIMEOUT_S)
    wire.parse_object(reply.status, reply.body, url)
