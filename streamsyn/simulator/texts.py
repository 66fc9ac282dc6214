"""The simulator's texts and their tokens, without a model.

Texts are sentences from word lists, and answers found in the prompt. A token is four characters; it has an
id, and a logprob that depends on the context.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import product
from random import Random
from typing import Final
from zlib import crc32

CHARACTERS_PER_TOKEN: Final = 4
VOCABULARY: Final = 49_152
NEW_WORD_LOSS: Final = 2.3
"""Mean negative log-likelihood, in nats, of a token whose word did not occur before. A real model gave 2.3
per token for an answer without its context, and half of that with it."""
KNOWN_WORD_LOSS: Final = 0.6
"""The same for a token whose word occurred before."""
_MAX_PIECES: Final = 2**20
_START: Final = -1
"""Stands for the id before the first one."""
_WORD: Final = re.compile(r"\w+")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+")
_ANSWER: Final = re.compile(r"^Answer:\s*\n?(?P<answer>\S.*?)\s*(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
POOL: Final = 4096  # a power of two, so that any odd stride walks through all of it
SENTENCES_A_PARAGRAPH: Final = 6


def count_tokens(content: str | Sequence[int]) -> int:
    """Return the number of tokens: one per four characters of a text, or the number of ids."""
    return -(-len(content) // CHARACTERS_PER_TOKEN) if isinstance(content, str) else len(content)


def token_ids(content: str | list[int], start: int = 0) -> list[int]:
    """Return the ids from token `start` on; ids are returned unchanged."""
    if not isinstance(content, str):
        return content[start:]
    step = CHARACTERS_PER_TOKEN
    return [
        crc32(content[at : at + step].encode("utf-8", "surrogatepass")) % VOCABULARY
        for at in range(start * step, len(content), step)
    ]


class Tokenizer:
    """Encodes text, and decodes ids that it has made itself.

    Different pieces of text may share an id, so a piece is looked up together with the id before it.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], str] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, and remember them for `decode`."""
        ids, step = token_ids(text), CHARACTERS_PER_TOKEN
        if len(self._pieces) > _MAX_PIECES:
            self._pieces.clear()
        pairs = zip([_START, *ids], ids, strict=False)
        self._pieces.update((pair, text[n * step : (n + 1) * step]) for n, pair in enumerate(pairs))
        return ids

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of `ids`, or None if `encode` did not make them; several texts may be joined.

        Each id gives four characters; the last piece of a text is padded with spaces.
        """
        known = self._pieces
        pieces = [
            known.get(pair) or known.get((_START, pair[1]), "")
            for pair in zip([_START, *ids], ids, strict=False)
        ]
        return "".join([piece.ljust(CHARACTERS_PER_TOKEN) for piece in pieces]) if all(pieces) else None


def token_losses(before: str, text: str) -> list[float]:
    """Return the negative log-likelihood of each token of `text` after `before`, in nats."""
    known = {word.lower() for word in _WORD.findall(before)}
    step = CHARACTERS_PER_TOKEN
    means = [KNOWN_WORD_LOSS] * -(-len(text) // step)
    for word in _WORD.finditer(text):
        if word[0].lower() not in known:
            first, last = word.start() // step, (word.end() - 1) // step
            means[first : last + 1] = [NEW_WORD_LOSS] * (last + 1 - first)
    return means


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.replace("\n", " ").split("|"))


TIMES: Final = _words(
    "In early spring|Before the second audit|During the long winter|After the harvest|By late evening|"
    "Once the ferry returned|Within a decade|On the third morning|Under the new charter|Shortly before noon|"
    "Following a dry summer|Over several seasons|At the annual meeting|Long after the flood|"
    "As the survey closed|In the final quarter"
)
ADJECTIVES: Final = _words(
    "narrow|patient|eastern|unfinished|quiet|municipal|weathered|ordinary|copper|forgotten|modest|coastal|reliable|"
    "distant|wooden|seasonal|curious|northern|fragile|annual|official|borrowed|luminous|practical|heavy|regional|"
    "amber|careful|abandoned|shallow|civic|portable|restored|tidal|woollen|private|mountain|early|granite|sober"
)
PEOPLE: Final = _words(
    "committee|engineers|archivists|teachers|surveyors|cooperative|curators|printers|volunteers|clerks|botanists|"
    "accountants|gardeners|merchants|sailors|masons|apprentices|farmers|guides|librarians|weavers|pilots|brewers|"
    "magistrates|physicians|carpenters|musicians|watchmakers|foresters|cartographers|millers|shepherds"
)
VERBS: Final = _words(
    "reviewed|measured|catalogued|compared|rebuilt|published|interviewed|tested|mapped|ordered|translated|repaired|"
    "sampled|reopened|counted|drafted|preserved|questioned|exchanged|painted|registered|inherited|described|sorted|"
    "financed|protected|collected|examined|doubled|abandoned|recovered|displayed"
)
OBJECTS: Final = _words(
    "tide tables|ledgers|glass plates|bridges|reports|tenancies|alloys|quarries|seedlings|letters|"
    "signal lamps|springs|reading rooms|geese|budgets|orchards|barometers|tunnels|manuscripts|looms|"
    "sluices|telescopes|recipes|harvests|contracts|lanterns|pumps|coins|anchors|herbariums|turbines|maps|violins|warehouses|"
    "hedges|engravings"
)
LINKS: Final = _words(
    "and|while|because|although|so that|until|even though|whereas|and soon|just as|since|after which|once|"
    "and by then|as if|before"
)
STARTS: Final = _words("Vel|Tarn|Os|Bre|Kel|Mor|Ash|Dun|Fen|Hal|Lor|Quil|Ren|Sel|Thar|Wes")
MIDDLES: Final = _words("a|e|i|o|an|en|in|on|ar|er|ir|or|al|el|il|ol")
ENDS: Final = _words("mora|wick|ford|haven|dale|ton|bury|mere|gate|stead|brook|field|cliff|moor|port|shaw")


@cache
def _pools() -> tuple[list[str], list[str], float]:
    """Return openings, endings, and the mean words of a sentence made of one of each."""
    rng = Random("pools")
    pick = rng.choice
    names = ["".join(parts) for parts in product(STARTS, MIDDLES, ENDS)]
    rng.shuffle(names)
    openings = [
        f"{pick(TIMES)}, the {pick(ADJECTIVES)} {pick(PEOPLE)} of {name} {pick(VERBS)} "
        f"{rng.randrange(12, 990)} {pick(ADJECTIVES)} {pick(OBJECTS)}"
        for name in names
    ]
    endings = [
        f"{pick(LINKS)} the {pick(PEOPLE)} near {name} {pick(VERBS)} {pick(ADJECTIVES)} {pick(OBJECTS)}."
        for name in reversed(names)
    ]
    assert len(openings) == POOL
    words = sum(half.count(" ") + 1 for half in openings + endings)
    return openings, endings, words / POOL


class Prose:
    """Writes plausible English of a given length in a few µs per text; no two texts are alike.

    A sentence joins one of 4,096 openings with one of 4,096 endings, each with its own place name. A text
    walks through both with its own strides: no half occurs twice within 4,096 sentences, and two texts share
    almost no sentence.

    Args:
        seed: Determines the texts.
        faithful: Share of texts that contain their subject.
    """

    def __init__(self, seed: int, faithful: float = 0.0) -> None:
        self._random = Random(f"text {seed}")
        self._faithful = faithful
        self._openings, self._endings, self._words_a_sentence = _pools()

    def pair(self) -> str:
        """Return a question and its answer, each with its label."""
        bits = self._random.getrandbits(24)
        time, _, deed = self._openings[bits & 4095].partition(", ")
        ending = self._endings[bits >> 12]
        asked = f"What happened {time[0].lower()}{time[1:]}, when {deed}?"
        return f"Question: {asked}\nAnswer: {ending[0].upper()}{ending[1:]}"

    def about(self, what: str, words: int) -> str:
        """Return a text of about `words` words; a faithful one has `what` in the middle."""
        text = self.write(words)
        if not what or not self._faithful or self._random.random() >= self._faithful:
            return text
        middle = text.find(". ", len(text) // 2) + 2
        end = "" if what.endswith((".", "!", "?")) else "."
        return (
            f"{text[:middle]}It is on record: {what}{end} {text[middle:]}" if middle > 1 else f"{text} {what}"
        )

    def write(self, words: int) -> str:
        """Return a text of about `words` words in paragraphs."""
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


def answering_sentence(message: str) -> str:
    """Return the sentence of the context that shares most words with the question; "" if none shares any.

    The last two paragraphs of `message` are the question, those before are the context.
    """
    *context, question, how = ["", "", *message.split("\n\n")]
    words = {word.lower() for word in _WORD.findall(f"{question} {how}")}
    sentences = [sentence for paragraph in context for sentence in _SENTENCE_END.split(paragraph.strip())]
    best = max(sentences, key=lambda sentence: len(words.intersection(_WORD.findall(sentence.lower()))))
    return best if words.intersection(_WORD.findall(best.lower())) else ""


def given_answer(prompt: str) -> str:
    """Return the text after `Answer:` in a prompt; "" if there is none."""
    answer = _ANSWER.search(prompt)
    return " ".join(answer["answer"].split()) if answer else ""
