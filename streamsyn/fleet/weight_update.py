"""Weight updates: pause a running server, have it load new weights from a directory, resume it.

Behaviour of SGLang 0.5.23: while a server is paused, requests in flight get no answer and new ones wait. A
paused server updates at once; otherwise it would first finish all running requests. After an update its model
has the name of the directory (see `ServerClient.models`).
"""

from pathlib import Path
from typing import Literal, TypeAlias

import orjson

from streamsyn.errors import RequestRefused
from streamsyn.fleet import wire
from streamsyn.fleet.transport import Transport
from streamsyn.plain_text import short_repr

PAUSE = "/pause_generation"
UPDATE = "/update_weights_from_disk"
CONTINUE = "/continue_generation"
CONTROL_TIMEOUT_S = 15.0

PauseMode: TypeAlias = Literal["retract", "in_place", "abort"]
"""What happens to requests in flight: computed again from their tokens, kept as they are, aborted."""


async def pause(transport: Transport, url: str, mode: PauseMode, timeout_s: float) -> None:
    """Pause the server. With `abort` it answers when no request is running any more.

    Raises:
        ServerError: It did not confirm, and may be paused or not.
    """
    body = orjson.dumps({"mode": mode})
    reply = await transport.exchange("POST", PAUSE, body=body, timeout_s=timeout_s)
    wire.parse_object(reply.status, reply.body, url)


async def load_weights(
    transport: Transport, url: str, folder: Path, version: str, mode: PauseMode, timeout_s: float
) -> None:
    """Load the weights in `folder`, an absolute path on the server's machine, into a paused server.

    The prefix cache is flushed, since the old weights computed it. With `in_place` it is kept: requests in
    flight still use it, and the server would refuse.

    Raises:
        RequestRefused: The server kept its old weights.
        ServerError: It did not answer.
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
        raise RequestRefused(f"{url} did not load {folder}: {short_repr(answer)}")


async def resume(transport: Transport, url: str) -> None:
    """Resume a paused server; a server that is not paused is unaffected.

    Raises:
        ServerError: It did not confirm, and may still be paused.
    """
    reply = await transport.exchange("POST", CONTINUE, body=b"{}", timeout_s=CONTROL_TIMEOUT_S)
    wire.parse_object(reply.status, reply.body, url)
