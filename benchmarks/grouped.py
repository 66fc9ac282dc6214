"""Requests of many prefix groups, and how much of them a prefix cache can give at best."""

import random
from dataclasses import dataclass, replace

from streamsyn.records import Request, digest
from streamsyn.simulator.chat import render
from streamsyn.simulator.radix_cache import BLOCK_TOKENS
from streamsyn.simulator.tokens import CHARACTERS_PER_TOKEN

TEMPLATE_CHARS = 4_000
GROUP_CHARS = 1_500
OWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for, in its order, and a prompt of each group to find its text by."""

    requests: list[Request]
    probes: list[Request]
    template_tokens: int
    """What the first request of a group can find in a server's cache."""
    group_tokens: int
    """What the other ones can."""

    def ideal(self, servers: int) -> int:
        """Tokens that are cached at best."""
        groups = len(self.probes)
        return (len(self.requests) - groups) * self.group_tokens + (groups - servers) * self.template_tokens


def _words(draw: random.Random, chars: int) -> str:
    text = ""
    while len(text) < chars:
        text += "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) + " "
    return text[:chars]


def work(groups: int, per_group: int, max_tokens: int) -> Work:
    """The requests of all groups, shuffled; the same in every process."""
    draw = random.Random(0)
    template = _words(draw, TEMPLATE_CHARS)
    template_key = digest(template).hex()
    texts = [f"Document {number}. {_words(draw, GROUP_CHARS)}"[:GROUP_CHARS] for number in range(groups)]

    def request(text: str, question: str) -> Request:
        key = digest(template, text).hex()
        messages = [
            {"role": "system", "content": template},
            {"role": "user", "content": f"{text}\n{question}"},
        ]
        return Request(messages, {"max_tokens": max_tokens}, key, (template_key, key))

    requests = [request(text, _words(draw, OWN_CHARS)) for text in texts for _ in range(per_group)]
    draw.shuffle(requests)
    probes = [replace(request(text, "?"), sampling={"max_tokens": 1}) for text in texts]
    prompts = [render(probe.messages, continues=False) for probe in probes]
    again = render(request(texts[0], "!").messages, continues=False)
    return Work(requests, probes, _shared_tokens(prompts[0], prompts[1]), _shared_tokens(prompts[0], again))


def _shared_tokens(one: str, other: str) -> int:
    """What a server finds of `other` when it has `one`: whole blocks."""
    chars = next(i for i, (mine, its) in enumerate(zip(one, other, strict=False)) if mine != its)
    return chars // (BLOCK_TOKENS * CHARACTERS_PER_TOKEN) * BLOCK_TOKENS
