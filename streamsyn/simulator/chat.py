"""POST /v1/chat/completions (srt/entrypoints/openai/protocol.py, serving_chat.py, sse_utils.py)."""

import time
from typing import Any

from streamsyn.simulator import protocol
from streamsyn.simulator.completion_request import (
    DEFAULT_MODEL,
    Answer,
    CompletionRequest,
    Malformed,
    Refused,
    whole_number,
)


class Chat:
    """Parses the bodies of the chat route, and formats its answers.

    Args:
        cache_report: Report cached tokens (`--enable-cache-report`).
    """

    def __init__(self, *, cache_report: bool) -> None:
        self._cache_report = cache_report

    def parse(self, body: dict[str, Any], rid: str) -> CompletionRequest:
        """Return the request in `body`; `rid` is used if it has none."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise Malformed("messages: Field required, a list of objects")
        if not messages:
            raise Refused("Messages cannot be empty.")
        if body.get("n", 1) != 1:
            raise Refused("The simulator writes one choice a request: n must be 1.")
        options = body.get("stream_options")
        named = body.get("rid")
        return CompletionRequest(
            rid=named if isinstance(named, str) else rid,
            model=str(body.get("model", DEFAULT_MODEL)),
            prompt=render(messages, continues=bool(body.get("continue_final_message"))),
            question=next((_text(m) for m in reversed(messages) if m.get("role") == "user"), ""),
            max_tokens=whole_number(body, "max_completion_tokens") or whole_number(body, "max_tokens"),
            ignore_eos=body.get("ignore_eos") is True,
            is_exam=len(messages) == 1 and body.get("temperature") == 0,
            stream=body.get("stream") is True,
            include_usage=isinstance(options, dict) and options.get("include_usage") is True,
            rank=whole_number(body, "routed_dp_rank"),
            with_details=body.get("return_cached_tokens_details") is True,
        )

    def refusal(self, message: str) -> protocol.Reply:
        """Return a refusal with 400."""
        return protocol.reply(protocol.error(message, "BadRequestError", 400), 400)

    def whole(self, request: CompletionRequest, answer: Answer) -> dict[str, Any]:
        """Return a `chat.completion`."""
        return {
            "id": request.rid,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.text, "reasoning_content": None},
                    "logprobs": None,
                    "finish_reason": answer.finish["type"],
                    "matched_stop": answer.finish.get("matched"),
                }
            ],
            "usage": self._usage(answer),
            "metadata": {"weight_version": answer.weight_version, "weight_versions": answer.weights},
            **_details(request, answer),
        }

    def piece(self, request: CompletionRequest, so_far: str, piece: str) -> bytes:
        """Return the event of the next piece; the first one is empty and has the role."""
        delta: dict[str, Any] = {"reasoning_content": None}
        if not so_far and not piece:
            delta["role"] = "assistant"
        delta["content"] = piece
        return _chunk(
            request,
            {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "matched_stop": None},
        )

    def last(self, request: CompletionRequest, answer: Answer) -> bytes:
        """Return the event with the finish reason, and one with the usage if requested."""
        end = {
            "index": 0,
            "delta": {"reasoning_content": None},
            "logprobs": None,
            "finish_reason": answer.finish["type"],
            "matched_stop": answer.finish.get("matched"),
        }
        events = _chunk(request, end)
        if details := _details(request, answer):
            events += protocol.event({**_head(request), "choices": [], "usage": None, **details})
        if request.include_usage:
            events += protocol.event({**_head(request), "choices": [], "usage": self._usage(answer)})
        return events

    def _usage(self, answer: Answer) -> dict[str, Any]:
        return {
            "prompt_tokens": answer.prompt_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            "completion_tokens": answer.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens} if self._cache_report else None,
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        }


def render(messages: list[dict[str, Any]], *, continues: bool) -> str:
    """Return the messages in a ChatML-like template that ends with an open assistant message.

    With `continues` a last assistant message stays open, so that prompt and answer together are a prefix of
    the next step's prompt. Otherwise the real server turns it into a user message.
    """
    *before, last = messages
    parts = [f"<|{message.get('role')}|>\n{_text(message)}<|end|>\n" for message in before]
    if last.get("role") == "assistant" and continues:
        return f"{''.join(parts)}<|assistant|>\n{_text(last)}"
    role = "user" if last.get("role") == "assistant" else last.get("role")
    return f"{''.join(parts)}<|{role}|>\n{_text(last)}<|end|>\n<|assistant|>\n"


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # content parts, of which only text is supported
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _details(request: CompletionRequest, answer: Answer) -> dict[str, Any]:
    """Return the tiers of the cached tokens, all on the device, if they were asked for and there are any."""
    if not request.with_details or not answer.cached_tokens:
        return {}
    return {"sglext": {"cached_tokens_details": {"device": answer.cached_tokens, "host": 0}}}


def _head(request: CompletionRequest) -> dict[str, Any]:
    return {
        "id": request.rid,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": request.model,
    }


def _chunk(request: CompletionRequest, choice: dict[str, Any]) -> bytes:
    return protocol.event({**_head(request), "choices": [choice]})
