from itertools import product
from random import Random
from typing import Final

POOL: Final = 4096  # a power of two, so that any odd stride walks through all of it
SENTENCES_A_PARAGRAPH: Final = 6

_TIMES = (
    "In early spring", "Before the second audit", "During the long winter", "After the harvest", "By late evening",
    "Once the ferry returned", "Within a decade", "On the third morning", "Under the new charter",
    "Following a dry summer", "Shortly before noon", "Over several seasons", "At the annual meeting",
    "Long after the flood", "In the final quarter", "As the survey closed",
)  # fmt: skip
_ACTORS = (
    "the harbour committee", "a visiting engineer", "the regional archive", "one retired teacher", "the survey team",
    "a small cooperative", "the museum's curator", "an independent laboratory", "the town's printer",
    "a group of volunteers", "the railway office", "the botanical society", "a junior accountant",
    "the weather station", "two former rivals", "the parish council",
)  # fmt: skip
_DEEDS = (
    "reviewed the tide tables", "measured the eastern wall", "catalogued forty glass plates", "compared both ledgers",
    "rebuilt the narrow bridge", "published a short report", "interviewed the remaining tenants",
    "tested a lighter alloy", "mapped the abandoned quarry", "ordered three hundred seedlings",
    "translated the founding letter", "repaired the signal lamps", "sampled the upper spring",
    "reopened the reading room", "counted migrating geese", "drafted a modest budget",
)  # fmt: skip
_LINKS = (
    "and", "while", "because", "although", "so that", "until", "even though", "whereas",
    "and soon", "just as", "since", "after which", "once", "and by then", "unless", "before",
)  # fmt: skip
_OTHERS = (
    "the older clerks", "most neighbouring villages", "several merchants", "the night watch", "younger apprentices",
    "the insurance company", "few local farmers", "critics in the capital", "the shipping agents",
    "both daughters", "the university press", "an anonymous donor", "the district court", "passing travellers",
    "the orchestra's patrons", "every licensed guide",
)  # fmt: skip
_RESULTS = (
    "kept a copy near the window", "had little reason to object", "found the figures surprisingly exact",
    "moved their stalls to higher ground", "asked for a second opinion", "remembered the earlier failure",
    "paid the outstanding fees in silver", "preferred the slower method", "recorded a gradual improvement",
    "disagreed about the cause", "stored the remaining timber indoors", "wrote at length to the editor",
    "relied on hand-drawn charts", "noticed a faint smell of resin", "celebrated with a modest supper",
    "waited for clearer instructions",
)  # fmt: skip


def _pool(rng: Random, *parts: tuple[str, ...]) -> list[str]:
    pool = [" ".join(words) for words in product(*parts)]
    assert len(pool) == POOL
    rng.shuffle(pool)
    return pool


class Prose:
    """Writes plausible English of a wanted length, each text different from all others, at a few µs a text.

    A sentence joins one of 4,096 openings with one of 4,096 endings. A text walks through both with strides of its
    own: no half comes twice within 4,096 sentences, and two texts share next to no sentence.
    """

    def __init__(self, seed: int) -> None:
        self._random = Random(f"text {seed}")
        self._openings = [f"{half}," for half in _pool(self._random, _TIMES, _ACTORS, _DEEDS)]
        self._endings = [f"{half}." for half in _pool(self._random, _LINKS, _OTHERS, _RESULTS)]
        halves = self._openings + self._endings
        self._words_a_sentence = 2 * sum(half.count(" ") + 1 for half in halves) / len(halves)

    def write(self, words: int) -> str:
        """A text of about `words` words in paragraphs."""
        bits = self._random.getrandbits(64)
        vary = 0.9 + 0.2 * (bits >> 48) / 65536
        sentences = max(1, round(words * vary / self._words_a_sentence))
        at, stride = bits & 4095, (bits >> 12 & 4095) | 1
        to, step = bits >> 24 & 4095, (bits >> 36 & 4095) | 1
        openings, endings = self._openings, self._endings
        lines = [
            f"{openings[at + n * stride & 4095]} {endings[to + n * step & 4095]}" for n in range(sentences)
        ]
        if words < self._words_a_sentence:  # less than one sentence: its first words
            return " ".join(lines[0].split()[:words]).rstrip(",.") + "."
        if sentences <= SENTENCES_A_PARAGRAPH:
            return " ".join(lines)
        breaks = range(0, sentences, SENTENCES_A_PARAGRAPH)
        return "\n\n".join(" ".join(lines[first : first + SENTENCES_A_PARAGRAPH]) for first in breaks)
