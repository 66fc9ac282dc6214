"""How many requests the KV pool of a server holds: the cap where the pool is the limit, not the seats.

A request holds its prompt from the start and grows by a token with each step of the server, until its answer
is complete and all of it is free again. So a pool holds on average the prompt and half of the answer of each
request: that gives the *level* of the cap. Prompts and answers are counted as the server's answers show them;
before the first answer of its kind a request is expected to use all of its `max_tokens`.

But requests that began together grow together and end together: filled to its level at once, the pool
overflows when all of them are nearly complete, and half of it is empty after that. So requests begin at an
even pace. If they do, n requests have written n * n / level halves of an answer, and the cap is the n for
which the pool holds what was really written. Where many began or ended at once, this spreads those that
follow over the time of an answer. Only a first quarter of the pool is filled at once, and later up to half of
the level, which fits even when all of it began together. Where the pool holds all requests that are left with
their whole answers, as in a small job, there is nothing to spread, and all begin at once.

A server that retracts requests although the level was kept (answers are longer than they were, or it has
other clients) lowers the level once, towards what really runs; it recovers with later answers.
"""

from dataclasses import dataclass, field
from math import inf, sqrt
from typing import NamedTuple

from streamsyn.fleet.wire import Load
from streamsyn.records import Completion, Request

_FILL = 0.87
"""Share of the pool to fill. SGLang admits no request into the last part: it keeps room for the answer of the
new request and for a tenth of what the running ones may still write (`new_token_ratio`)."""
_LEAST_FILL = _FILL / 2
_FIRST_SHARE = 1 / 4
"""Share of the pool that requests which begin together may fill with their complete answers."""
_LESS = 0.95
_MOST_AT_ONCE = 0.75
"""Factors of `_FILL` after a retraction: of what really runs, and at least."""
_RECOVERY = 1e-3
"""By how much the share recovers with each answer, from one generation of requests after a retraction on."""
_QUEUE = 0.08
_SHORTEST_QUEUE = 2
"""Queue to aim for at a server, as a share of its running requests and in requests."""

_CHARS_PER_TOKEN = 4.0
_UNKNOWN_TOKENS = 4096
"""Expected answer without `max_tokens`; SGLang expects no more either."""
_PRIOR = 8
_PRIOR_SHARE = 1 / 8
"""Weight of the length asked for in the mean of a kind, in answers: `_PRIOR`, or `_PRIOR_SHARE` of the
requests in flight if that is more. The first answers to arrive are the shortest: alone they would mislead."""
_MEMORY = 500
"""Answers after which older ones are forgotten little by little."""
_MAX_KINDS = 1000


class Footprint(NamedTuple):
    """What placement and limits know of a request: what it shares with others, and its sizes.

    Attributes:
        group: See `Request`.
        prefixes: See `Request`.
        messages: Number of messages.
        chars: Characters of all messages.
        opening_chars: Characters of the prompt; of a conversation, those before its first answer.
        template_chars: Characters of the system message if other requests have the same one, else 0.
        conversation_tokens: See `Request`.
        kind: Requests of one kind have answers of similar lengths: the task and `max_tokens`, which tells the
            steps of a recipe apart.
        is_scored: Whether nothing is generated.
        has_answers: Whether it continues a conversation.
    """

    group: str = ""
    prefixes: tuple[str, ...] = ()
    messages: int = 0
    chars: int = 0
    opening_chars: int = 0
    template_chars: int = 0
    conversation_tokens: int = 0
    kind: tuple[str, int] = ("", _UNKNOWN_TOKENS)
    is_scored: bool = False
    has_answers: bool = False

    @classmethod
    def of(cls, request: Request) -> "Footprint":
        """Return the footprint of a request."""
        asked = request.sampling.get("max_tokens", request.sampling.get("max_completion_tokens"))
        max_tokens = asked if isinstance(asked, int) and asked > 0 else _UNKNOWN_TOKENS
        messages, before_answer, chars = request.messages, -1, 0
        for message in messages:
            if before_answer < 0 and message["role"] == "assistant":
                before_answer = chars
            chars += len(message["content"])
        has_answers, tokens = before_answer >= 0, request.conversation_tokens
        is_template = request.prefixes and messages[0]["role"] == "system"
        return cls(
            request.group,
            request.prefixes,
            len(messages),
            chars,
            before_answer if tokens and has_answers else chars,
            len(messages[0]["content"]) if is_template else 0,
            tokens,
            (request.task, max_tokens),
            request.scored is not None,
            has_answers,
        )

    @property
    def max_tokens(self) -> int:
        """Longest answer that is asked for, in tokens."""
        return self.kind[1]

    def without_group(self) -> "Footprint":
        """Return that of the same request, which shares nothing with others."""
        return self._replace(group="", prefixes=(), template_chars=0)


class Expected(NamedTuple):
    """Tokens that a request is expected to hold in the pool.

    Attributes:
        prompt: From its start, without what it shares with other requests.
        growth: By how many it grows until its end, or until the end of its conversation.
    """

    prompt: int
    growth: int


NOTHING = Expected(0, 0)


@dataclass(slots=True)
class Mean:
    """A mean that forgets old values little by little."""

    value: float
    weight: float = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self.weight = min(self.weight + 1, _MEMORY)
        self.value += (value - self.value) / self.weight


@dataclass(slots=True)
class PoolCap:
    """The cap of one server by its KV pool. No I/O, no clock.

    Attributes:
        level: The cap at an even pace, as of the last reading.
    """

    level: float = 0.0
    _number: int = 0
    _prompts: int = 0
    _growth: int = 0
    """Requests in flight, and the sums of what they are expected to hold."""
    _last: Expected = NOTHING
    _answers: dict[tuple[str, int], Mean] = field(default_factory=dict)
    """Tokens of an answer by kind."""
    _chars_per_token: Mean = field(default_factory=lambda: Mean(_CHARS_PER_TOKEN))
    _shared: Mean = field(default_factory=lambda: Mean(0.0))
    """Tokens of a prompt that were cached because other requests have them too."""
    _fill: float = _FILL
    _answers_until_change: int = 0
    """Answers until the share to fill may change again."""
    _seen: int = 0
    """Answers so far."""

    def begin(self, footprint: Footprint) -> Expected:
        """Count a request as in flight. Return what it is expected to hold, for `end`."""
        expected = self.expected(footprint)
        self._number += 1
        self._prompts += expected.prompt
        self._growth += expected.growth
        self._last = expected
        return expected

    def end(self, expected: Expected) -> None:
        """Undo `begin`: the request is not in flight any more."""
        self._number -= 1
        self._prompts -= expected.prompt
        self._growth -= expected.growth

    def expected(self, footprint: Footprint) -> Expected:
        """Return what a request is expected to hold."""
        growth = footprint.conversation_tokens
        if not growth and not footprint.is_scored:
            seen = self._answers.get(footprint.kind)
            growth = footprint.max_tokens if seen is None else round(seen.value)
        chars = footprint.opening_chars
        if not self._shared.weight:  # no answer has shown yet how much of it is shared
            chars -= footprint.template_chars
        prompt = chars / self._chars_per_token.value - self._shared.value
        return Expected(max(1, round(prompt)), growth)

    def learn(self, footprint: Footprint, completion: Completion) -> None:
        """Record an answer: how long it is, how many tokens its prompt has, and how many were shared."""
        self._seen += 1
        if self._answers_until_change:
            self._answers_until_change -= 1
        else:
            self._fill = min(_FILL, self._fill + _RECOVERY)
        if not footprint.is_scored and not footprint.conversation_tokens:
            kind = footprint.kind
            if kind not in self._answers and len(self._answers) >= _MAX_KINDS:
                del self._answers[next(iter(self._answers))]
            prior = Mean(footprint.max_tokens, max(_PRIOR, _PRIOR_SHARE * self._number))
            self._answers.setdefault(kind, prior).add(completion.completion_tokens)
        if completion.tokens_estimated or not completion.prompt_tokens:
            return
        self._chars_per_token.add(footprint.chars / completion.prompt_tokens)
        if not footprint.has_answers:
            self._shared.add(completion.cached_tokens)

    def cap(self, load: Load, left: float = inf) -> int | None:
        """Return the cap; None if the pool is not known, or not the limit.

        Args:
            load: The server's load metrics.
            left: How many requests it may still get, those in flight included.
        """
        if not load.pool_tokens or self._last is NOTHING:
            return None
        prompt, growth = self._means()
        self._adapt(load)
        self.level = max(1.0, self._fill * load.pool_tokens / (prompt + growth / 2))
        queue = max(_SHORTEST_QUEUE, _QUEUE * load.running)
        if load.max_running and self.level >= load.max_running + queue:
            return None
        cap = self.level
        if growth and left * (prompt + growth) > load.pool_tokens:
            written = max(0.0, load.token_usage * load.pool_tokens - load.running * prompt)
            first = _FIRST_SHARE * load.pool_tokens / growth
            if self._seen >= self.level:  # its answers are known
                first = max(first, self.level / 2)
            cap = min(cap, max(first, sqrt(2 * self.level * written / growth)))
        if load.waiting > queue:  # those in the queue will begin together: send none after them
            cap = min(cap, self._number - load.waiting + queue)
        return max(1, int(cap))

    def _means(self) -> tuple[float, float]:
        """Return what a request in flight holds on average: prompt, and growth until its end."""
        if not self._number:
            return self._last
        return self._prompts / self._number, self._growth / self._number

    def _adapt(self, load: Load) -> None:
        """Lower the share to fill after a retraction, once in a generation of requests."""
        if not load.retracted or self._answers_until_change or not self.level:
            return
        runs = _LESS * load.running / self.level
        self._fill = max(_LEAST_FILL, self._fill * min(_LESS, max(_MOST_AT_ONCE, runs)))
        self._answers_until_change = max(1, self._number)
