"""What goes over the wire to an SGLang server (0.5) and what comes back; no I/O here.

The chat route is OpenAI's, so any compatible server will do. Shapes of failures are SGLang's; two
kinds of error object exist, `{"object": "error", "message": ...}` and `{"error": {"message": ...}}`,
and either may come inside a 200.

What a server says of its load: `GET /v1/loads?include=core,queues` of SGLang 0.5.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from streamsyn.errors import BrokenResponse, RequestRefused, ServerBusy, ServerError, ServerUnavailable
from streamsyn.records import Completion, Request

T = TypeVar("T")

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
MODEL_INFO = "/model_info"
SERVER_INFO = "/server_info"
HEALTH = "/health"
ABORT = "/abort_request"
LOADS = "/v1/loads?include=core,queues"
TOKENIZE = "/tokenize"
GENERATE = "/generate"
ROUTING_KEY = "X-SMG-Routing-Key"
"""By which a router in front of servers keeps requests together; servers take it too."""

_MISCONFIGURED = frozenset({401, 403, 404, 405})
"""Statuses that say something about the server or the key, not about the request."""
_DUPLICATE = "Duplicate request ID"
"""A server still has the request that a connection was lost with: the next try has another rid."""
_SHOWN = 200


def chat_body(request: Request, model: str, rid: str, *, stream: bool = False) -> bytes:
    """The body of a chat request; with `stream`, for an answer that `parse_chat_stream` reads."""
    body = {"model": model, "messages": request.messages, "rid": rid, **request.sampling}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(body)


def parse_chat(status: int, body: bytes, server: str) -> Completion:
    """The completion in a chat answer.

    Raises:
        ServerError: There is none; which one says what to do next.
    """
    return _completion(_parsed(status, body, server), body, server)


def parse_object(status: int, body: bytes, server: str) -> Any:
    """What an answer of another route holds.

    Raises:
        ServerError: It is none, or says that something is wrong.
    """
    answer = _parsed(status, body, server)
    if (message := _error_message(answer)) is not None:
        raise error_of(_error_code(answer), message, server)
    return answer


def _parsed(status: int, body: bytes, server: str) -> Any:
    if status != 200:
        raise error_of(status, _message(body), server)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BrokenResponse(f"{server} answered no JSON: {_shown(body)}") from error


def parse_chat_stream(status: int, body: bytes, server: str) -> Completion:
    """The completion in a streamed chat answer that has come to its end.

    Raises:
        ServerError: There is none; which one says what to do next.
    """
    if status != 200:
        raise error_of(status, _message(body), server)
    events = [event.removeprefix(b"data: ") for event in body.replace(b"\r\n", b"\n").split(b"\n\n") if event]
    if not events or events.pop().strip() != b"[DONE]":
        raise BrokenResponse(f"{server} cut its stream short: {_shown(body[-_SHOWN:])}")
    answer: dict[str, Any] = {"choices": [{"message": {}, "finish_reason": None}]}
    choice, text = answer["choices"][0], []
    try:
        for event in map(orjson.loads, events):
            if (message := _error_message(event)) is not None:
                raise error_of(_error_code(event), message, server)
            answer.update((name, event[name]) for name in ("model", "usage", "metadata") if event.get(name))
            for part in event["choices"]:
                text.append(part["delta"].get("content") or "")
                choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    except orjson.JSONDecodeError as error:
        raise BrokenResponse(f"{server} streamed no JSON: {_shown(body)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenResponse(f"{server} streamed an event without {error}: {_shown(body)}") from error
    choice["message"]["content"] = "".join(text)
    return _completion(answer, body, server)


def _completion(answer: Any, body: bytes, server: str) -> Completion:
    try:
        if (message := _error_message(answer)) is not None:
            raise error_of(_error_code(answer), message, server)
        choice, usage = answer["choices"][0], answer["usage"]
        details, metadata = usage.get("prompt_tokens_details"), answer.get("metadata")
        finish_reason = choice["finish_reason"]
        completion = Completion(
            text=check_status(choice["message"]["content"] or "", str),
            finish_reason=finish_reason,
            prompt_tokens=count(usage["prompt_tokens"]),
            cached_tokens=count((details or {}).get("cached_tokens") or 0),
            completion_tokens=count(usage["completion_tokens"]),
            model=check_status(answer["model"], str),
            server=server,
            weight_version=weights_of(metadata or {}),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenResponse(f"{server} answered without {error}: {_shown(body)}") from error
    if finish_reason not in ("stop", "length"):
        said = f"{server} ended its answer with {finish_reason!r}"
        raise BrokenResponse(said, completion.completion_tokens)
    return completion


def check_status(value: Any, kind: type[T]) -> T:
    """`value`, which goes into the log as it is, and so has to be what readers of the log expect."""
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} where there is {value!r:.40}")
    return value


def count(value: Any) -> int:
    """`value`, which has to be a number of tokens."""
    number = check_status(value, int)
    if isinstance(value, bool) or not 0 <= number < 2**31:
        raise TypeError(f"a count where there is {value!r:.40}")
    return number


def error_of(status: int, message: str, server: str) -> ServerError:
    """The error that an HTTP status (or the code of an error object) and its message stand for."""
    said = f"{server} answered {status}: {message}"
    if status == 429 or (status == 503 and "queue is full" in message):
        return ServerBusy(said)
    if status >= 500 or status == 408 or status in _MISCONFIGURED:
        return ServerUnavailable(said)
    if 400 <= status < 500 and _DUPLICATE not in message:
        return RequestRefused(said)
    return BrokenResponse(said)


def served_models(body: bytes) -> list[str]:
    """Names in an answer of /v1/models.

    Raises:
        BrokenResponse: It is no such answer.
    """
    try:
        return [model["id"] for model in orjson.loads(body)["data"]]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise BrokenResponse(f"{MODELS} is not answered as expected: {_shown(body)}") from error


def weights_of(meta: dict[str, Any]) -> str | None:
    """The version of the weights that wrote an answer, as `metadata` or `meta_info` has it; of several, which
    wrote one after the other, all are named: `step_100+step_200`.
    """
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version") or ""}]
    return "+".join(dict.fromkeys(check_status(span["version"], str) for span in spans)) or None


def started_as(body: bytes) -> str | None:
    """The name that a server was started with, in an answer of /server_info, if it is there. Once it has read
    other weights, it calls its model by their directory everywhere else (SGLang 0.5.23).
    """
    try:
        name = orjson.loads(body)["served_model_name"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def weight_version(body: bytes) -> str | None:
    """The version of the weights in an answer of /model_info, if it is there."""
    try:
        version = orjson.loads(body)["weight_version"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _error_message(answer: Any) -> str | None:
    """The message, if `answer` is an error object of either kind."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if isinstance(error, dict):
        return str(error.get("message", error))
    if isinstance(error, str):
        return error
    said = answer.get("object") == "error" or answer.get("success") is False
    return str(answer.get("message")) if said else None


def _error_code(answer: dict[str, Any]) -> int:
    nested = answer.get("error")
    code = nested.get("code") if isinstance(nested, dict) else answer.get("code")
    return code if isinstance(code, int) else 500


def _message(body: bytes) -> str:
    try:
        message = _error_message(orjson.loads(body))
    except orjson.JSONDecodeError:
        message = None
    return message or _shown(body)


def _shown(body: bytes) -> str:
    return repr(body[:_SHOWN].decode(errors="replace")) if body else "(nothing)"


_SHOWN_STAMP = 200


@dataclass(frozen=True, slots=True)
class Load:
    """One reading, over all data-parallel ranks of a server.

    Attributes:
        running: Requests in the running batch.
        waiting: Requests that wait for a place in it.
        waiting_uncached_tokens: Prompt tokens of those that no cache will spare.
        token_usage: Share of the KV pool that running requests use, of the fullest rank.
        pool_tokens: Size of the KV pool.
        max_running: Requests that the batch may hold.
        generated_per_s: Tokens written a second, as the server counts it.
        retracted: Requests taken out of the batch again for want of room in the KV pool, lately.
        taken_at: The server's own stamps; a reading that has those of another one is that other one.
    """

    running: int
    waiting: int
    waiting_uncached_tokens: int = 0
    token_usage: float = 0.0
    pool_tokens: int = 0
    max_running: int = 0
    generated_per_s: float = 0.0
    retracted: int = 0
    taken_at: tuple[float, ...] | None = None


def parse_load(body: bytes) -> Load:
    """The reading in an answer of `/v1/loads`.

    Raises:
        BrokenResponse: It is no such answer.
    """
    try:
        ranks: list[dict[str, Any]] = orjson.loads(body)["loads"]
        return Load(
            running=sum(int(rank["num_running_reqs"]) for rank in ranks),
            waiting=sum(int(rank["num_waiting_reqs"]) for rank in ranks),
            waiting_uncached_tokens=sum(int(rank.get("num_waiting_uncached_tokens") or 0) for rank in ranks),
            token_usage=max(float(rank.get("token_usage") or 0) for rank in ranks),
            pool_tokens=sum(int(rank.get("max_total_num_tokens") or 0) for rank in ranks),
            max_running=sum(int(rank.get("max_running_requests") or 0) for rank in ranks),
            generated_per_s=sum(float(rank.get("gen_throughput") or 0) for rank in ranks),
            retracted=sum(int((rank.get("queues") or {}).get("retracted") or 0) for rank in ranks),
            taken_at=_stamps(ranks),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        shown = body[:_SHOWN_STAMP].decode(errors="replace")
        raise BrokenResponse(f"/v1/loads is not answered as expected ({error!r}): {shown!r}") from error


def _stamps(ranks: list[dict[str, Any]]) -> tuple[float, ...] | None:
    stamps = tuple(rank.get("timestamp") for rank in ranks)
    return None if None in stamps else tuple(float(stamp) for stamp in stamps if stamp is not None)
