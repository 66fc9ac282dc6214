"""A scored request: how likely is a text as the answer to messages? Two tokenizations and one prefill.

`Request.scored` is the text, and of it only the first `max_tokens` tokens (in `Request.sampling`) count. The
messages are tokenized by the server as for a chat request, so both share their prefix in its cache. Token
ids come from no other place than the server that they are sent to: one that is out of range ends its process.

It takes SGLang (0.5.23 was tried): `/tokenize` that takes messages, and `/generate` that takes ids and
returns `input_token_logprobs`. vLLM has the first and not the second. A router passes `/generate` on; what it
answers to `/tokenize` may come from a tokenizer or a server of its own choosing, which is fine only where all
of its servers have the same one. Where either is missing `check_scores` says so before anything is asked.
"""

import math
from typing import Any

import orjson

from streamsyn.errors import BrokenResponse, RequestRefused
from streamsyn.fleet import wire
from streamsyn.fleet.transport import Transport
from streamsyn.records import Completion, Request

_ABSENT = (404, 405, 501)
_PROBE = Request([{"role": "user", "content": "Is it?"}], {}, scored="Yes, it is.")
"""What a server is asked to score to find out whether it can."""


class NoScores(RequestRefused):
    """Raised when a server has no such routes: nothing can be scored there."""


async def score(
    transport: Transport, url: str, request: Request, model: str, rid: str, timeout_s: float
) -> Completion:
    """The completion that says how likely `request.scored` is; it has no text.

    Args:
        transport: Leads to the server.
        url: The server's, for messages.
        request: What is scored, and what it answers.
        model: What the server is asked for.
        rid: Of the prefill, the only part that takes long.
        timeout_s: Bound on each of the three calls.

    Raises:
        ServerError: No usable answer came; the kind says what to do next.
    """
    assert request.scored is not None, "only a scored request is scored"
    headers = {wire.ROUTING_KEY: request.group} if request.group else {}

    async def ask(path: str, body: dict[str, Any]) -> Any:
        reply = await transport.exchange(
            "POST", path, body=orjson.dumps(body), headers=headers, timeout_s=timeout_s
        )
        if reply.status in _ABSENT:
            raise NoScores(f"scoring needs SGLang: {url} answered {reply.status} to {path}")
        return wire.parse_object(reply.status, reply.body, url)

    prompt = _ids(await ask(wire.TOKENIZE, {"model": model, "messages": request.messages}), url)
    answer = _ids(
        await ask(wire.TOKENIZE, {"model": model, "prompt": request.scored, "add_special_tokens": False}), url
    )[: request.sampling.get("max_tokens")]
    if not prompt or not answer:
        raise RequestRefused(f"{url} finds no token in what is to be scored")
    body = {
        "input_ids": prompt + answer,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,  # what lies before it may come from the cache
        "rid": rid,
    }
    said = await ask(wire.GENERATE, body)
    try:
        return _completion(said["meta_info"], answer, model, url)
    except (KeyError, IndexError, TypeError) as error:
        raise BrokenResponse(f"{url} scored without {error}: {str(said)[:200]}") from error


async def check_scores(transport: Transport, url: str, model: str, rid: str, timeout_s: float) -> None:
    """Have the server score a few words.

    Raises:
        RequestRefused: It cannot; the text says why.
        ServerError: It gave no answer, for now.
    """
    await score(transport, url, _PROBE, model, rid, timeout_s)


def _ids(said: Any, url: str) -> list[int]:
    tokens = said.get("tokens") if isinstance(said, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise NoScores(f"scoring needs SGLang: {url} gives no token ids for messages")
    return tokens


def _completion(meta: Any, answer: list[int], model: str, url: str) -> Completion:
    """The rows are [logprob, token id, text or null]: first the last token of the prompt, for which there
    is no logprob, then one a token of the answer.
    """
    if meta["finish_reason"]["type"] == "abort":
        raise BrokenResponse(f"{url} aborted its scoring")
    rows = meta["input_token_logprobs"][-len(answer) :]
    if [row[1] for row in rows] != answer:
        raise BrokenResponse(f"{url} scored other tokens than it was sent")
    return Completion(
        text="",
        finish_reason="length",
        prompt_tokens=wire.count(meta["prompt_tokens"]),
        cached_tokens=wire.count(meta.get("cached_tokens") or 0),
        completion_tokens=0,
        model=model,
        server=url,
        weight_version=wire.weights_of(meta),
        logprobs=tuple(_logprob(row[0]) for row in rows),
    )


def _logprob(value: Any) -> float:
    """Finite: of a probability that the server rounds to nothing there is none, and no mean either."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError(f"a logprob where there is {value!r:.40}")
    return float(value)
