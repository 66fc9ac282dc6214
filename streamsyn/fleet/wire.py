"""The wire protocol of an SGLang server (0.5): request bodies, answers, errors and load metrics. No I/O.

The chat route is OpenAI's, so any compatible server works. Errors have SGLang's two forms,
`{"object": "error", "message": ...}` and `{"error": {"message": ...}}`; either may come with status 200.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from streamsyn.errors import (
    BrokenResponse,
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)
from streamsyn.records import Completion, Request
from streamsyn.thoughts import thought_tokens

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
"""Header by which a router sends requests of one group to one server; servers accept it too."""

_MISCONFIGURED = frozenset({401, 403, 404, 405})
"""Statuses that concern the server or the key, not the request."""
_DUPLICATE = "Duplicate request ID"
"""A server still has the request of a lost connection; the next try has a new rid."""
_PREVIEW_BYTES = 200


def chat_body(request: Request, model: str, rid: str, *, stream: bool = False) -> bytes:
    """Return the body of a chat request; with `stream`, `parse_chat_stream` reads the answer."""
    body = {"model": model, "messages": request.messages, "rid": rid, **request.sampling}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(body)


def parse_chat(status: int, body: bytes, server: str) -> Completion:
    """Return the completion in a chat answer.

    Raises:
        ServerError: There is none; the subclass says what to do next.
    """
    return _completion(_parsed(status, body, server), body, server)


def parse_object(status: int, body: bytes, server: str) -> Any:
    """Return the JSON in an answer of any other route.

    Raises:
        ServerError: The answer is not JSON, or is an error.
    """
    answer = _parsed(status, body, server)
    if (message := _error_message(answer)) is not None:
        raise error_for(_error_code(answer), message, server)
    return answer


def _parsed(status: int, body: bytes, server: str) -> Any:
    if status != 200:
        raise error_for(status, _message(body), server)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BrokenResponse(f"{server} did not answer JSON: {_preview(body)}") from error


def parse_chat_stream(status: int, body: bytes, server: str) -> Completion:
    """Return the completion in a complete streamed chat answer.

    Raises:
        ServerError: There is none; the subclass says what to do next.
    """
    if status != 200:
        raise error_for(status, _message(body), server)
    events = [event.removeprefix(b"data: ") for event in body.replace(b"\r\n", b"\n").split(b"\n\n") if event]
    if not events or events.pop().strip() != b"[DONE]":
        raise ServerUnavailable(f"{server} ended its stream early: {_preview(body[-_PREVIEW_BYTES:])}")
    answer: dict[str, Any] = {"choices": [{"message": {}, "finish_reason": None}]}
    choice, text, thought = answer["choices"][0], [], []
    try:
        for event in map(orjson.loads, events):
            if (message := _error_message(event)) is not None:
                raise error_for(_error_code(event), message, server)
            answer.update((name, event[name]) for name in ("model", "usage", "metadata") if event.get(name))
            for part in event["choices"]:
                text.append(part["delta"].get("content") or "")
                thought.append(_thought(part["delta"]))
                choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    except orjson.JSONDecodeError as error:
        raise BrokenResponse(f"{server} streamed an event that is not JSON: {_preview(body)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenResponse(f"{server} streamed an invalid event ({error!r}): {_preview(body)}") from error
    choice["message"] = {"content": "".join(text), "reasoning_content": "".join(thought)}
    return _completion(answer, body, server)


def _completion(answer: Any, body: bytes, server: str) -> Completion:
    try:
        if (message := _error_message(answer)) is not None:
            raise error_for(_error_code(answer), message, server)
        choice, usage = answer["choices"][0], answer["usage"]
        details, metadata = usage.get("prompt_tokens_details"), answer.get("metadata")
        finish_reason, message = choice["finish_reason"], choice["message"]
        text = expect(message["content"] or "", str)
        tokens = token_count(usage["completion_tokens"])
        completion = Completion(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=token_count(usage["prompt_tokens"]),
            cached_tokens=token_count((details or {}).get("cached_tokens") or 0),
            completion_tokens=tokens,
            model=expect(answer["model"], str),
            server=server,
            weight_version=weight_versions_of(metadata or {}),
            thinking_tokens=min(
                tokens, _thinking_tokens(usage) or thought_tokens(_thought(message), text, tokens)
            ),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenResponse(f"{server} sent an invalid answer ({error!r}): {_preview(body)}") from error
    if finish_reason not in ("stop", "length"):
        message = f"{server} ended its answer with finish_reason {finish_reason!r}"
        raise BrokenResponse(message, completion.completion_tokens)
    return completion


def _thought(message: dict[str, Any]) -> str:
    """Return the thought in a message of a server with a reasoning parser; the field has two names."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return thought if isinstance(thought, str) else ""


def _thinking_tokens(usage: dict[str, Any]) -> int:
    """Return the tokens of a thought, where OpenAI or where SGLang reports them; 0 if neither does."""
    details = usage.get("completion_tokens_details") or {}
    return token_count(details.get("reasoning_tokens") or usage.get("reasoning_tokens") or 0)


def expect(value: Any, kind: type[T]) -> T:
    """Return `value`, or raise TypeError if it is not a `kind`: it is written to the run's log as it is."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {value!r:.40}")
    return value


def token_count(value: Any) -> int:
    """Return `value`, or raise TypeError if it is not a number of tokens."""
    number = expect(value, int)
    if isinstance(value, bool) or not 0 <= number < 2**31:
        raise TypeError(f"expected a token count, got {value!r:.40}")
    return number


def check_rate_limit(status: int, body: bytes, server: str, retry_after_s: float | None) -> None:
    """Check that an answer does not ask to wait.

    Raises:
        RateLimited: It has the status 429, or asks for a pause with 503 and `Retry-After`.
    """
    if status == 429 or (status == 503 and retry_after_s is not None):
        text = f"{server} answered {status}: {_message(body)}"
        raise RateLimited(text, retry_after_s=retry_after_s)


def error_for(status: int, message: str, server: str) -> ServerError:
    """Return the error for an HTTP status, or for the code of an error object, and its message."""
    text = f"{server} answered {status}: {message}"
    if status == 429:
        return RateLimited(text)
    if status == 503 and "queue is full" in message:
        return ServerBusy(text)
    if status >= 500 or status == 408 or status in _MISCONFIGURED:
        return ServerUnavailable(text)
    if 400 <= status < 500 and _DUPLICATE not in message:
        return RequestRefused(text)
    return BrokenResponse(text)


def parse_models(body: bytes) -> list[str]:
    """Return the model names in an answer of /v1/models.

    Raises:
        BrokenResponse: The answer is invalid.
    """
    try:
        return [model["id"] for model in orjson.loads(body)["data"]]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise BrokenResponse(f"invalid answer of {MODELS}: {_preview(body)}") from error


def weight_versions_of(meta: dict[str, Any]) -> str | None:
    """Return the version of the weights that wrote an answer, from its `metadata` or `meta_info`.

    Several versions, which wrote one after the other, are joined: `step_100+step_200`.
    """
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version") or ""}]
    return "+".join(dict.fromkeys(expect(span["version"], str) for span in spans)) or None


def parse_served_name(body: bytes) -> str | None:
    """Return the model name that a server was started with, from an answer of /server_info, if present.

    After a weight update SGLang 0.5.23 uses the directory as the model's name everywhere else.
    """
    try:
        name = orjson.loads(body)["served_model_name"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def parse_weight_version(body: bytes) -> str | None:
    """Return the version of the weights in an answer of /model_info, if present."""
    try:
        version = orjson.loads(body)["weight_version"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _error_message(answer: Any) -> str | None:
    """Return the message if `answer` is an error object of either form."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if isinstance(error, dict):
        return str(error.get("message", error))
    if isinstance(error, str):
        return error
    is_error = answer.get("object") == "error" or answer.get("success") is False
    return str(answer.get("message")) if is_error else None


def _error_code(answer: dict[str, Any]) -> int:
    nested = answer.get("error")
    code = nested.get("code") if isinstance(nested, dict) else answer.get("code")
    return code if isinstance(code, int) else 500


def _message(body: bytes) -> str:
    try:
        message = _error_message(orjson.loads(body))
    except orjson.JSONDecodeError:
        message = None
    return message or _preview(body)


def _preview(body: bytes) -> str:
    return repr(body[:_PREVIEW_BYTES].decode(errors="replace")) if body else "(nothing)"


@dataclass(frozen=True, slots=True)
class Load:
    """Load metrics of a server, over all its data-parallel ranks.

    Attributes:
        running: Requests in the running batch.
        waiting: Requests in the queue.
        waiting_uncached_tokens: Prompt tokens in the queue that are not in the prefix cache.
        token_usage: Share of the KV pool that running requests use, on the fullest rank.
        pool_tokens: Size of the KV pool.
        max_running: Maximum requests in the batch.
        generated_per_s: Generated tokens per second, as the server measures them.
        retracted: Requests recently moved back to the queue, since the KV pool was full.
        taken_at: Time stamps of the ranks; two readings with the same stamps are the same reading.
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
    """Return the load metrics in an answer of `/v1/loads`.

    Raises:
        BrokenResponse: The answer is invalid.
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
        raise BrokenResponse(f"invalid answer of /v1/loads ({error!r}): {_preview(body)}") from error


def _stamps(ranks: list[dict[str, Any]]) -> tuple[float, ...] | None:
    stamps = tuple(rank.get("timestamp") for rank in ranks)
    return None if None in stamps else tuple(float(stamp) for stamp in stamps if stamp is not None)
