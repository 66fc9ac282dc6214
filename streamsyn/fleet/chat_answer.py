"""Reads chat answers of any OpenAI-compatible server: one JSON object, or server-sent events. No I/O.

The text counts: what only describes it is optional. Missing token counts are estimated; without a model name,
the one that was asked for is taken.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from streamsyn.answer_text import thought_tokens
from streamsyn.errors import BrokenResponse, ServerUnavailable
from streamsyn.fleet import wire
from streamsyn.plain_text import cut
from streamsyn.records import Completion

_BYTES_PER_TOKEN = 4
"""Of UTF-8, for estimates: about right for current tokenizers, in English and in Chinese."""
_TEXT_PARTS = ("text", "output_text")
"""Types of content parts that are text; others, such as `thinking`, are left out."""
_THOUGHT_FIELDS = ("reasoning_content", "reasoning")
"""Fields of a message in which servers keep a thought apart."""
_THOUGHT_PARTS = ("thinking", "reasoning", "text")
"""Fields of a content part that is a thought."""
_CUT = frozenset({"length", "max_tokens", "max_length", "max_output_tokens", "model_length"})
"""Finish reasons of answers cut at their maximum length, as servers spell it."""
_UNFINISHED = (
    "abort",
    "cancel",
    "content_filter",
    "error",
    "function_call",
    "insufficient_system_resource",
    "tool_calls",
)
"""How finish reasons of answers begin whose text is incomplete, or is not the answer. Any other is a stop."""
_LOST = ("abort", "cancel", "error", "insufficient_system_resource")
"""How finish reasons of answers begin that the server did not finish."""
_PARTS_AT_END = ("model", "usage", "metadata", "sglext")
"""Fields of events of a stream that describe the whole answer."""
_DONE = b"[DONE]"
_LINES = re.compile(rb"(?:[^\r\n]+(?:\r\n|\r|\n|\Z))+")
"""Lines up to a blank one."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Asked(NamedTuple):
    """What was asked.

    Attributes:
        server: The server's URL, for messages.
        model: The model.
        message_bytes: UTF-8 bytes of each message.
    """

    server: str
    model: str
    message_bytes: Sequence[int]


def parse_chat(status: int, body: bytes, asked: Asked) -> Completion:
    """Return the completion in a chat answer.

    Raises:
        ServerError: There is none; the subclass says what to do next.
    """
    answer = wire.parse_object(status, body, asked.server)
    try:
        choice = answer["choices"][0]
        text, thought = _text_and_thought(choice["message"])
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenResponse(
            f"{asked.server} sent an invalid answer ({error!r}): {wire.preview(body)}"
        ) from error
    return _completion(text, thought, reason, answer, asked)


def parse_whole(status: int, body: bytes, asked: Asked) -> Completion:
    """Return the completion in an answer to a `Request.body`, with the whole answer.

    Calls of tools, several choices and filtered content are answers like others.

    Raises:
        ServerError: There is no answer; the subclass says what to do next.
    """
    answer = wire.parse_object(status, body, asked.server)
    try:
        choices = [wire.expect(choice, dict) for choice in answer["choices"]]
        reasons = [str(choice.get("finish_reason") or "stop") for choice in choices]
        text, thought = _text_and_thought(wire.expect(choices[0]["message"], dict))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenResponse(
            f"{asked.server} sent an invalid answer ({error!r}): {wire.preview(body)}"
        ) from error
    if lost := next((reason for reason in reasons if reason.lower().startswith(_LOST)), None):
        raise BrokenResponse(f"{asked.server} ended its answer with finish_reason {lost!r}")
    read = _completion(text, thought, "stop", answer, asked)
    return replace(read, finish_reason=cut(reasons[0], wire.NAME_BYTES), body=answer)


def parse_chat_stream(status: int, body: bytes, asked: Asked) -> Completion:
    """Return the completion in a complete streamed chat answer, or in one that the server did not stream.

    The text is complete when a finish reason or `[DONE]` has come.

    Raises:
        ServerError: There is none; the subclass says what to do next.
    """
    if status != 200 or body.lstrip().startswith(b"{"):
        return parse_chat(status, body, asked)
    texts: list[tuple[str, str]] = []
    last: dict[str, Any] = {}
    reason, is_done = None, False
    try:
        for data in events_in(body):
            is_done = data.strip() == _DONE
            if is_done:
                break
            event = wire.read_json(data)
            wire.raise_error_in(event, asked.server)
            last.update((name, event[name]) for name in _PARTS_AT_END if event.get(name))
            for part in event.get("choices") or ():
                if not part.get("index"):
                    texts.append(_text_and_thought(part.get("delta") or part.get("message") or {}))
                    reason = part.get("finish_reason") or reason
    except ValueError as error:  # not JSON
        if reason is None and body.rstrip().endswith(_DONE):
            raise _invalid(error, body, asked) from error
    except (TypeError, AttributeError) as error:
        if reason is None:
            raise _invalid(error, body, asked) from error
    if reason is None and not is_done:
        raise ServerUnavailable(f"{asked.server} ended its stream early: {wire.preview(body[-200:])}")
    text, thought = ("".join(pieces) for pieces in zip(*texts, strict=True)) if texts else ("", "")
    return _completion(text, thought, reason, last, asked)


def _invalid(error: Exception, body: bytes, asked: Asked) -> BrokenResponse:
    return BrokenResponse(f"{asked.server} streamed an invalid event ({error!r}): {wire.preview(body)}")


def events_in(body: bytes) -> Iterator[bytes]:
    """Yield the data of each server-sent event.

    Source: "Server-sent events" in the HTML standard; unlike there, an event may be ended by the end of the
    stream.
    """
    for event in _LINES.finditer(body.removeprefix(_BYTE_ORDER_MARK)):
        fields = (line.partition(b":") for line in event[0].splitlines())
        data = [value.removeprefix(b" ") for name, _, value in fields if name == b"data"]
        if data:
            yield b"\n".join(data)


def _text_and_thought(message: dict[str, Any]) -> tuple[str, str]:
    """Return the text of a message, and its thought where the server keeps that apart.

    The content is a string, null, or parts, of which those that are text are joined.

    Raises:
        TypeError: It is something else.
    """
    content, thoughts = message.get("content"), [_thought_in(message, _THOUGHT_FIELDS)]
    if not isinstance(content, list):
        return wire.expect(content or "", str), thoughts[0]
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type", "text") in _TEXT_PARTS:
            texts.append(wire.expect(part.get("text") or "", str))
        else:
            thoughts.append(_thought_in(part, _THOUGHT_PARTS))
    return "".join(texts), "".join(thoughts)


def _thought_in(part: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the thought in one of the fields of a message or of a part: a string, or parts."""
    thought = next((part[name] for name in names if part.get(name)), "")
    if isinstance(thought, list):
        thought = "".join(str(_dict(inner).get("text", "")) for inner in thought)
    return thought if isinstance(thought, str) else ""


def _completion(text: str, thought: str, reason: Any, answer: dict[str, Any], asked: Asked) -> Completion:
    usage = _dict(answer.get("usage"))
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    is_estimated = prompt is None or completion is None
    if prompt is None:
        prompt = sum(map(_estimate, asked.message_bytes))
    if completion is None:
        completion = _estimate(len((thought + text).encode()))
    tiers = wire.tokens_by_tier(_dict(answer.get("sglext")).get("cached_tokens_details"))
    device, host, storage = tiers or (0, 0, 0)
    cached = _count(_dict(usage.get("prompt_tokens_details")).get("cached_tokens"))
    if cached is None:  # a server without --enable-cache-report
        cached = device + host + storage
    cached = min(cached, prompt)
    model = answer.get("model")
    return Completion(
        text=text,
        finish_reason=_finish_reason(reason, completion, asked.server),
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        model=cut(model, wire.NAME_BYTES) if model and isinstance(model, str) else asked.model,
        server=asked.server,
        weight_version=wire.weight_versions_of(answer.get("metadata")),
        thinking_tokens=min(completion, _thinking_tokens(usage) or thought_tokens(thought, text, completion)),
        tokens_estimated=is_estimated,
        cached_host_tokens=min(host, cached),
        cached_storage_tokens=min(storage, max(0, cached - host)),
    )


def _thinking_tokens(usage: dict[str, Any]) -> int:
    """Return the tokens of a thought, where OpenAI or where SGLang reports them; 0 if neither does."""
    details = _dict(usage.get("completion_tokens_details"))
    return _count(details.get("reasoning_tokens")) or _count(usage.get("reasoning_tokens")) or 0


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    """Return a token count; None if the server does not give a usable one."""
    if value is None:  # often: an exception costs more than the rest of an answer's counts
        return None
    try:
        return wire.token_count(value)
    except TypeError:
        return None


def _estimate(text_bytes: int) -> int:
    return -(-text_bytes // _BYTES_PER_TOKEN)


def _finish_reason(reason: Any, completion_tokens: int, server: str) -> str:
    """Return `stop` or `length`.

    Raises:
        BrokenResponse: The text is incomplete.
    """
    if isinstance(reason, dict):  # as on SGLang's own route
        reason = reason.get("type")
    name = reason.lower() if isinstance(reason, str) else ""
    if name.startswith(_UNFINISHED):
        raise BrokenResponse(f"{server} ended its answer with finish_reason {reason!r}", completion_tokens)
    return "length" if name in _CUT else "stop"
