"""The wire protocol of an SGLang server (0.5): request bodies, answers, errors and load metrics. No I/O.

The chat route is OpenAI's, so any compatible server works. Errors have SGLang's two forms,
`{"object": "error", "message": ...}` and `{"error": {"message": ...}}`; either may come with status 200.
"""

import json
import re
from collections.abc import Collection
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
from streamsyn.plain_text import cut, short_repr
from streamsyn.records import Request

T = TypeVar("T")

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
MODEL_INFO = "/model_info"
SERVER_INFO = "/server_info"
HEALTH = "/health"
ABORT = "/abort_request"
LOADS = "/v1/loads?include=core,queues"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
GENERATE = "/generate"
ROUTING_KEY = "X-SMG-Routing-Key"
"""Header by which a router sends requests of one group to one server; servers accept it too."""

RANK = "routed_dp_rank"
"""Field of a request that names a data-parallel rank."""
_MAX_RANKS = 1024

_MISCONFIGURED = frozenset({401, 403, 404, 405})
"""Statuses that concern the server or the key, not the request."""
_DUPLICATE = "Duplicate request ID"
"""A server still has the request of a lost connection; the next try has a new rid."""
_PREVIEW_BYTES = 200
NAME_BYTES = 512
"""Longest name of a model or of weights."""
_MAX_NUMBER = 2**53
_SURROGATE = re.compile("[\ud800-\udfff]")

_OPTIONAL_FIELDS = {
    name: re.compile(rb"\b%b\b" % name.encode())
    for name in ("rid", "stream_options", "chat_template_kwargs", "return_cached_tokens_details", RANK)
}
_REFUSES_FIELDS = (400, 422)
_UNKNOWN_FIELD = re.compile(
    rb"extra|additional|unknown|unrecogni[sz]ed|unexpected|unsupported"
    rb"|not (?:a )?(?:permitted|allowed|supported|valid|known)|invalid (?:field|argument|parameter|property)"
    rb"|out of range",
    re.IGNORECASE,
)


def chat_body(
    request: Request,
    model: str,
    rid: str,
    *,
    stream: bool = False,
    details: bool = False,
    rank: int | None = None,
    without: Collection[str] = (),
) -> bytes:
    """Return the body of a chat request.

    Args:
        request: The request.
        model: The model to use.
        rid: Its id.
        stream: Ask for a streamed answer.
        details: Ask for the tiers of the cached tokens; not with a `Request.body`, whose answer is passed on.
        rank: The data-parallel rank to use, unless a `Request.body` names one; None for any.
        without: Optional fields to leave out; of a `Request.body` only the rid and the rank.
    """
    routed = {} if rank is None or RANK in without else {RANK: rank}
    if request.body is not None:
        own = {"model": model} if "rid" in without else {"model": model, "rid": rid}
        return orjson.dumps(routed | request.body | own)
    body = {"model": model, "messages": request.messages, "rid": rid, **request.sampling}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= routed
    if details:
        body["return_cached_tokens_details"] = True
    return orjson.dumps({name: value for name, value in body.items() if name not in without})


def refused_field(status: int, body: bytes) -> str | None:
    """Return which optional field of a chat request a refusal names as unknown; None if it names none.

    Servers other than SGLang and vLLM may refuse unknown fields; each words it in its own way.
    """
    if status not in _REFUSES_FIELDS or not _UNKNOWN_FIELD.search(body):
        return None
    return next((name for name, pattern in _OPTIONAL_FIELDS.items() if pattern.search(body)), None)


def parse_object(status: int, body: bytes, server: str) -> Any:
    """Return the JSON in an answer.

    Raises:
        ServerError: The answer is not JSON, or is an error.
    """
    if status != 200:
        raise error_for(status, _message(body), server)
    try:
        answer = read_json(body)
    except ValueError as error:
        raise BrokenResponse(f"{server} did not answer JSON: {preview(body)}") from error
    raise_error_in(answer, server)
    return answer


def raise_error_in(answer: Any, server: str) -> None:
    """Raise the error for an error object, which may come with status 200; anything else has no effect."""
    if (text := _error_message(answer)) is not None:
        raise error_for(_error_code(answer), text, server)


def read_json(body: bytes) -> Any:
    """Return the JSON value in `body`.

    Some servers send control characters in strings, or cut a character in two: such JSON is read as well. An
    invalid character becomes U+FFFD.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return _read_leniently(body)


def _read_leniently(body: bytes) -> Any:
    try:
        return _encodable(json.loads(body.decode("utf-8-sig", "replace"), strict=False))
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _encodable(value: Any) -> Any:
    """Return a JSON value without lone surrogates, which UTF-8 does not have."""
    match value:
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case list():
            return [_encodable(item) for item in value]
        case dict():
            return {_encodable(name): _encodable(item) for name, item in value.items()}
        case _:
            return value


def expect(value: Any, kind: type[T]) -> T:
    """Return `value`, or raise TypeError if it is not a `kind`: it is written to the run's log as it is."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {short_repr(value)}")
    return value


def number(value: Any) -> float:
    """Return a finite number that is not negative, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_NUMBER:
        raise TypeError(f"expected a number, got {short_repr(value)}")
    return value


def token_count(value: Any) -> int:
    """Return a number of tokens, which may be written as `100.0`, or raise TypeError."""
    count = number(value)
    if count != int(count) or count >= 2**31:
        raise TypeError(f"expected a token count, got {short_repr(value)}")
    return int(count)


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
        models = [model["id"] for model in read_json(body)["data"]]
        return [cut(expect(model, str), NAME_BYTES) for model in models]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenResponse(f"invalid answer of {MODELS}: {preview(body)}") from error


def parse_context_tokens(body: bytes, model: str) -> int | None:
    """Return the context length of a model in an answer of /v1/models; None if it is not there."""
    try:
        lengths = {one["id"]: one.get("max_model_len") for one in read_json(body)["data"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    length = lengths.get(model)
    return length if type(length) is int and length > 0 else None


def weight_versions_of(meta: Any) -> str | None:
    """Return the version of the weights that wrote an answer, from its `metadata` or `meta_info`, if present.

    Several versions, which wrote one after the other, are joined: `step_100+step_200`.
    """
    try:
        spans = meta.get("weight_versions") or [{"version": meta.get("weight_version") or ""}]
        versions = "+".join(dict.fromkeys(expect(span["version"], str) for span in spans))
    except (KeyError, TypeError, AttributeError):  # another server's own metadata
        return None
    return cut(versions, NAME_BYTES) or None


@dataclass(frozen=True, slots=True)
class Features:
    """What an SGLang server can do, by its flags; the defaults are those of any other server.

    Attributes:
        has_details: Whether answers should be asked for the tiers of their cached tokens: there are several,
            or that is the only way to learn of any.
        ranks: Data-parallel ranks, each with a prefix cache of its own; a request may name one.
    """

    has_details: bool = False
    ranks: int = 1


def parse_features(body: bytes) -> Features:
    """Return what an answer of /server_info tells; whatever else it may be, that of any other server."""
    try:
        info = read_json(body)
    except ValueError:
        return Features()
    if not isinstance(info, dict):
        return Features()
    has_tiers = info.get("enable_hierarchical_cache") is True or info.get("enable_lmcache") is True
    has_details = has_tiers or info.get("enable_cache_report") is False
    return Features(has_details=has_details, ranks=_ranks(info))


def _ranks(info: dict[str, Any]) -> int:
    """Return how many ranks there are to choose from.

    `--dp-size N --enable-dp-attention` is shown as an `attn_dp_size` of N. Where prefill and decode are
    apart, a router chooses.
    """
    sizes = [info.get(name, 1) for name in ("dp_size", "attn_dp_size")]
    if info.get("disaggregation_mode", "null") != "null" or not all(type(size) is int for size in sizes):
        return 1
    ranks: int = sizes[0] * sizes[1]
    return ranks if 1 <= ranks <= _MAX_RANKS else 1


def tokens_by_tier(details: Any) -> tuple[int, int, int] | None:
    """Return the cached tokens from device, host and storage in `cached_tokens_details`; None without it."""
    try:
        return (
            token_count(details["device"]),
            token_count(details["host"]),
            token_count(details.get("storage") or 0),
        )
    except (KeyError, TypeError, AttributeError):
        return None


def name_in(body: bytes, field: str) -> str | None:
    """Return a name in an answer of a control route: `field` of its JSON object, if present."""
    try:
        name = read_json(body)[field]
    except (ValueError, KeyError, TypeError):
        return None
    return cut(name, NAME_BYTES) if isinstance(name, str) else None


def _error_message(answer: Any) -> str | None:
    """Return the message if `answer` is an error object of either form."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if isinstance(error, dict):
        return _text(error.get("message", error))
    if isinstance(error, str):
        return error
    is_error = answer.get("object") == "error" or answer.get("success") is False
    return _text(answer.get("message")) if is_error else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else short_repr(value)


def _error_code(answer: dict[str, Any]) -> int:
    nested = answer.get("error")
    code = nested.get("code") if isinstance(nested, dict) else answer.get("code")
    return code if isinstance(code, int) else 500


def _message(body: bytes) -> str:
    try:
        text = _error_message(read_json(body))
    except ValueError:
        text = None
    return text or preview(body)


def preview(body: bytes) -> str:
    """Return the beginning of a body, for a message."""
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
        ranks: list[dict[str, Any]] = read_json(body)["loads"]
        return Load(
            running=sum(int(number(rank["num_running_reqs"])) for rank in ranks),
            waiting=sum(int(number(rank["num_waiting_reqs"])) for rank in ranks),
            waiting_uncached_tokens=_total(ranks, "num_waiting_uncached_tokens"),
            token_usage=max(number(rank.get("token_usage") or 0) for rank in ranks),
            pool_tokens=_total(ranks, "max_total_num_tokens"),
            max_running=_total(ranks, "max_running_requests"),
            generated_per_s=sum(number(rank.get("gen_throughput") or 0) for rank in ranks),
            retracted=_total([rank.get("queues") or {} for rank in ranks], "retracted"),
            taken_at=_stamps(ranks),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenResponse(f"invalid answer of /v1/loads ({error!r}): {preview(body)}") from error


def _total(ranks: list[dict[str, Any]], name: str) -> int:
    return sum(int(number(rank.get(name) or 0)) for rank in ranks)


def _stamps(ranks: list[dict[str, Any]]) -> tuple[float, ...] | None:
    stamps = tuple(rank.get("timestamp") for rank in ranks)
    return None if None in stamps else tuple(float(number(stamp)) for stamp in stamps)
