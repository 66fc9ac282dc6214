"""Requests of many prefix groups, and the most prompt tokens that a prefix cache can save."""

import random
from dataclasses import dataclass, replace

from streamsyn.records import Request, digest
from streamsyn.simulator.chat import render
from streamsyn.simulator.radix_cache import BLOCK_TOKENS
from streamsyn.simulator.texts import CHARACTERS_PER_TOKEN

TEMPLATE_CHARS = 4_000
GROUP_CHARS = 1_500
OWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Work:
    """The requests in order, and for each group a short request that detects its text in a cache."""

    requests: list[Request]
    probes: list[Request]
    template_tokens: int
    """Tokens that the first request of a group can find in a server's cache."""
    group_tokens: int
    """Tokens that each later request of a group can find there."""

    def ideal(self, servers: int) -> int:
        """Return the most prompt tokens that can come from the caches of `servers` servers."""
        groups = len(self.probes)
        return (len(self.requests) - groups) * self.group_tokens + (groups - servers) * self.template_tokens


def _words(rng: random.Random, chars: int) -> str:
    text = ""
    while len(text) < chars:
        text += "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) + " "
    return text[:chars]


def work(groups: int, per_group: int, max_tokens: int) -> Work:
    """Return the shuffled requests of all groups; the same in every process.

    Args:
        groups: Number of prefix groups.
        per_group: Requests of a group.
        max_tokens: Maximum tokens of an answer.
    """
    rng = random.Random(0)
    template = _words(rng, TEMPLATE_CHARS)
    template_key = digest(template).hex()
    texts = [f"Document {number}. {_words(rng, GROUP_CHARS)}"[:GROUP_CHARS] for number in range(groups)]

    def request(text: str, question: str) -> Request:
        key = digest(template, text).hex()
        messages = [
            {"role": "system", "content": template},
            {"role": "user", "content": f"{text}\n{question}"},
        ]
        return Request(messages, {"max_tokens": max_tokens}, key, (template_key, key))

    requests = [request(text, _words(rng, OWN_CHARS)) for text in texts for _ in range(per_group)]
    rng.shuffle(requests)
    probes = [replace(request(text, "?"), sampling={"max_tokens": 1}) for text in texts]
    prompts = [render(probe.messages, continues=False) for probe in probes]
    same_group = render(request(texts[0], "!").messages, continues=False)
    return Work(
        requests, probes, _shared_tokens(prompts[0], prompts[1]), _shared_tokens(prompts[0], same_group)
    )


def _shared_tokens(one: str, other: str) -> int:
    """Return the tokens of `other` that are cached when `one` is: whole blocks only."""
    chars = next(i for i, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return chars // (BLOCK_TOKENS * CHARACTERS_PER_TOKEN) * BLOCK_TOKENS
