"""Scored requests: the logprobs of a given answer to messages, from two tokenizations and one prefill.

`Request.scored` is the answer; only its first `max_tokens` tokens (in `Request.sampling`) count. The server
tokenizes the messages as for a chat request, so both share their prefix in its cache. Token ids are sent only
to the server that they came from: an id that is out of range ends its process.

This needs SGLang (tested with 0.5.23): `/tokenize` that takes messages, and `/generate` that takes ids and
returns `input_token_logprobs`. vLLM has the first and not the second. A router forwards `/generate`, but may
answer `/tokenize` with a tokenizer or a server of its own choice, which is correct only if all its servers
have the same tokenizer. `Scorer.check` finds out whether a server has both routes.
"""

from typing import Any

import orjson

from streamsyn.errors import BrokenResponse, RequestRefused
from streamsyn.fleet import wire
from streamsyn.fleet.thinking import PromptEnds, template_fields
from streamsyn.fleet.transport import Transport
from streamsyn.plain_text import short_repr
from streamsyn.records import Completion, Request
from streamsyn.telemetry import trace_headers

_MAX_NATS = 1e9
"""No logprob is as large; NaN and infinity are not below it either."""
_ABSENT = (404, 405, 501)
_PROBE = Request([{"role": "user", "content": "Is it?"}], {}, scored="Yes, it is.")
"""Scored to find out whether a server can."""


class NoScores(RequestRefused):
    """Raised when a server lacks the routes that scoring needs."""


class Scorer:
    """Scores answers at one server.

    Args:
        transport: Carries requests to the server.
        url: The server's URL, for messages.
        ends: How its chat templates end prompts.
    """

    def __init__(self, transport: Transport, url: str, ends: PromptEnds) -> None:
        self._transport = transport
        self._url = url
        self._ends = ends

    async def score(
        self, request: Request, model: str, rid: str, timeout_s: float, rank: int | None = None
    ) -> Completion:
        """Return a completion with the logprobs of `request.scored`; its text is empty.

        A thought that the prompt opens is closed before the answer.

        Args:
            request: The messages and the answer to score.
            model: The model to use.
            rid: Request id of the prefill, the only call that takes long.
            timeout_s: Timeout of each call in seconds.
            rank: The data-parallel rank to use; None for any.

        Raises:
            ServerError: No usable answer came; the subclass says what to do next.
        """
        assert request.scored is not None, "the request has no answer to score"
        url, fields = self._url, template_fields(request)

        async def ask(path: str, body: dict[str, Any]) -> Any:
            return await self._ask(path, body, request.group, timeout_s)

        prompt = _ids(await ask(wire.TOKENIZE, {"model": model, "messages": request.messages, **fields}), url)
        answer = _ids(
            await ask(wire.TOKENIZE, {"model": model, "prompt": request.scored, "add_special_tokens": False}),
            url,
        )[: request.sampling.get("max_tokens")]
        if not prompt or not answer:
            raise RequestRefused(f"{url} finds no tokens in the messages or in the answer to score")
        prompt = (await self._ends.of(model, fields)).closed(prompt)
        body = {
            "input_ids": prompt + answer,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,  # tokens before it may come from the cache
            "rid": rid,
            **({} if rank is None else {wire.RANK: rank}),
        }
        answered = await ask(wire.GENERATE, body)
        try:
            return _completion(answered["meta_info"], answer, model, url)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise BrokenResponse(
                f"{url} sent an invalid score ({error!r}): {short_repr(answered)}"
            ) from error

    async def check(self, model: str, rid: str, timeout_s: float) -> None:
        """Check that the server can score, by scoring a few words.

        Raises:
            RequestRefused: It cannot; the message says why.
            ServerError: It did not answer.
        """
        await self.score(_PROBE, model, rid, timeout_s)

    async def _ask(self, path: str, body: dict[str, Any], group: str, timeout_s: float) -> Any:
        reply = await self._transport.exchange(
            "POST",
            path,
            body=orjson.dumps(body),
            headers=trace_headers() | ({wire.ROUTING_KEY: group} if group else {}),
            timeout_s=timeout_s,
        )
        wire.check_rate_limit(reply.status, reply.body, self._url, reply.retry_after_s)
        if reply.status in _ABSENT:
            raise NoScores(f"scoring needs SGLang: {self._url} answered {reply.status} to {path}")
        return wire.parse_object(reply.status, reply.body, self._url)


def _ids(answered: Any, url: str) -> list[int]:
    tokens = answered.get("tokens") if isinstance(answered, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise NoScores(f"scoring needs SGLang: {url} does not return token ids for messages")
    return tokens


def _completion(meta: Any, answer: list[int], model: str, url: str) -> Completion:
    """Read `input_token_logprobs`: rows of [logprob, token id, text or null].

    The first row is the last token of the prompt, without a logprob; then there is one per answer token.
    """
    if meta["finish_reason"]["type"] == "abort":
        raise BrokenResponse(f"{url} aborted the scoring request")
    rows = meta["input_token_logprobs"][-len(answer) :]
    if [row[1] for row in rows] != answer:
        raise BrokenResponse(f"{url} scored different tokens than it was sent")
    cached = wire.token_count(meta.get("cached_tokens") or 0)
    _, host, storage = wire.tokens_by_tier(meta.get("cached_tokens_details")) or (0, 0, 0)
    return Completion(
        text="",
        finish_reason="length",
        prompt_tokens=wire.token_count(meta["prompt_tokens"]),
        cached_tokens=cached,
        cached_host_tokens=min(host, cached),
        cached_storage_tokens=min(storage, max(0, cached - host)),
        completion_tokens=0,
        model=model,
        server=url,
        weight_version=wire.weight_versions_of(meta),
        logprobs=tuple(_logprob(row[0]) for row in rows),
    )


def _logprob(value: Any) -> float:
    """Return a finite logprob; a probability that the server rounds to zero has none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _MAX_NATS:
        raise TypeError(f"expected a logprob, got {short_repr(value)}")
    return float(value)
