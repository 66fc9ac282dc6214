"""Needle questions: numbers hidden in long synthetic text, after RULER (Hsieh et al., arXiv 2404.06654).

The haystack is made of plain sentences without digits. The kinds of questions:

    single       one key has one number
    multi_key    several keys have a number each; one of them is asked for
    multi_value  one key has several numbers; all of them are asked for
    multi_query  several keys have a number each; all of them are asked for

Lengths are in tokens of the model: counted with its tokenizer in a training, and estimated by `measured` for
a model that is only known by its server.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import islice
from typing import Final, Protocol

import orjson

from streamsyn.config.command_sections import NeedleKind, NeedlesSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.scoring.suites.ruler_suite import string_match_all
from streamsyn.scoring.suites.suite_question import SuiteQuestion, as_user

NEEDLES: Final = "needles"
ANSWER_TOKENS: Final = 128
"""Maximum tokens of an answer, as in RULER."""
_MANY: Final = 4
"""Number of keys, or of values of a key, where there are several."""
_TOLERANCE: Final = 0.01
"""A prompt may be shorter than its length by this share."""
_TRIES: Final = 12
_PROBE_WORDS: Final = 400
"""Words of filler from which tokens per word are estimated."""


class Lengths(Protocol):
    """Counts tokens of a model, or estimates them."""

    def length(self, message: str) -> int:
        """Tokens of the prompt for a user message."""

    def tokens(self, text: str) -> float:
        """Tokens of a text."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Lengths by the number of characters.

    Attributes:
        around: Tokens that the chat template adds.
        per_char: Tokens per character.
    """

    around: float
    per_char: float

    def length(self, message: str) -> int:
        """Tokens of the prompt for a user message."""
        return round(self.around + self.tokens(message))

    def tokens(self, text: str) -> float:
        """Tokens of a text."""
        return self.per_char * len(text)


async def measured(prompt_tokens: Callable[[str], Awaitable[int]]) -> Estimate:
    """Find out how long haystacks are in tokens of a model, from two prompts.

    Args:
        prompt_tokens: Returns the tokens of the prompt for a user message, as its server counts them.
    """
    filler = await asyncio.to_thread(_probe)  # it reads the packaged words
    half = filler[: len(filler) // 2]
    short, long = await prompt_tokens(half), await prompt_tokens(filler)
    per_char = (long - short) / (len(filler) - len(half))
    return Estimate(short - per_char * len(half), per_char)


@cache
def words(kind: str) -> tuple[str, ...]:
    """The packaged words of a kind: `who`, `did`, `where`, `when`, `and`, `colours`, `things`."""
    packaged = files("streamsyn") / "data" / "needles" / "words.json"
    return tuple(orjson.loads(packaged.read_bytes())[kind])


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield random sentences forever, never the same one twice in a row."""
    before = ""
    while True:
        parts = [rng.choice(words(kind)) for kind in ("who", "did", "where")]
        if rng.random() < 0.6:
            parts.append(rng.choice(words("when")))
        if rng.random() < 0.4:
            parts[-1] += ","
            parts.append(rng.choice(words("and")))
        text = " ".join(parts)
        if text != before:
            yield text[0].upper() + text[1:] + "."
        before = text


@dataclass(frozen=True, slots=True)
class Hidden:
    """The needles of one question.

    Attributes:
        needles: Sentences with their depths; a depth from 0 to 1 is the share of the haystack before it.
        request: The question.
        wanted: The numbers that answer it.
    """

    needles: tuple[tuple[float, str], ...]
    request: str
    wanted: tuple[str, ...]


def needle_questions(
    section: NeedlesSection, run_seed: int, lengths: Lengths, positions: int | None = None
) -> Iterator[SuiteQuestion]:
    """Make all questions, grouped by part. They are the same for the same seed and lengths.

    Args:
        section: `train.needles`.
        run_seed: `run.seed`, which seeds keys, numbers and haystacks.
        lengths: Counts tokens.
        positions: Number of positions of the model; None if it is not known.

    Raises:
        ConfigError: A length exceeds the model's positions, or is too short for the needles.
    """
    for length in section.lengths:
        if positions is not None and length > positions:
            raise ConfigError(
                f"train.needles.lengths: {length} is more than the {positions} positions of the model"
            )
    for kind in dict.fromkeys(section.kinds):
        for length in sorted(set(section.lengths)):
            for number in range(section.samples):
                yield _question(kind, length, number, section.samples, run_seed, lengths, positions)


def needle_count(section: NeedlesSection) -> int:
    """The number of questions of a section."""
    return len(set(section.kinds)) * len(set(section.lengths)) * section.samples


def hide(kind: NeedleKind, depth: float, rng: random.Random) -> Hidden:
    """Make the needles of a question: the first at `depth`, the others at equal distances from it."""
    names = rng.sample(
        [f"{colour}-{thing}" for colour in words("colours") for thing in words("things")], _MANY
    )
    values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), _MANY)]
    count = 1 if kind == "single" else _MANY
    keys = [names[0]] * count if kind == "multi_value" else names[:count]
    depths = [depth, *((depth + n / count) % 1 for n in range(1, count))]
    needles = tuple(
        (at, f"The locker number of {key} is {value}.")
        for at, key, value in zip(depths, keys, values, strict=False)
    )
    match kind:
        case "single" | "multi_key":
            asked, wanted = f"What is the locker number of {names[0]}?", values[:1]
        case "multi_value":
            asked, wanted = f"{names[0]} has {_MANY} locker numbers. What are all of them?", values
        case "multi_query":
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            asked, wanted = f"What are the locker numbers of {listed}?", values
    return Hidden(needles, asked, tuple(wanted))


def message(filler: Sequence[str], hidden: Hidden) -> str:
    """The user message: words of filler, with the needles inserted between sentences."""
    if filler and not filler[-1].endswith("."):
        filler = [*filler[:-1], f"{filler[-1]}..."]  # cut off in the middle of a sentence
    ends = [0, *(n for n, word in enumerate(filler, 1) if word.endswith("."))]
    placed = sorted((round(at * (len(ends) - 1)), text) for at, text in hidden.needles)
    parts, begin = [], 0
    for end, text in placed:
        parts += [*filler[begin : ends[end]], text]
        begin = max(begin, ends[end])
    parts += filler[begin:]
    return (
        "Some locker numbers are hidden in the text below. Remember them: you will be asked about them.\n\n"
        f"{' '.join(parts)}\n\n"
        f"That was the text. {hidden.request} Answer with nothing but what the text says."
    )


def _question(
    kind: NeedleKind,
    length: int,
    number: int,
    samples: int,
    run_seed: int,
    lengths: Lengths,
    positions: int | None,
) -> SuiteQuestion:
    rng = random.Random(digest("needles", str(run_seed), kind, str(length), str(number)))
    hidden = hide(kind, number / (samples - 1) if samples > 1 else 0.5, rng)
    # Leave positions for the answer.
    room = length if positions is None else min(length, positions - ANSWER_TOKENS)
    text = _filled(hidden, _filler(rng), room, lengths)
    if text is None:
        raise ConfigError(f"train.needles.lengths: {length} tokens are too few for the needles of {kind}")
    return SuiteQuestion(
        suite=NEEDLES,
        part=f"needle_{kind}_{length}",
        id=str(number),
        messages=as_user(text),
        max_tokens=ANSWER_TOKENS,
        wanted=hidden.wanted,
        rule=partial(string_match_all, wanted=hidden.wanted),
    )


def _probe() -> str:
    return " ".join(islice(_filler(random.Random(0)), 2 * _PROBE_WORDS))


def _filler(rng: random.Random) -> Iterator[str]:
    for sentence in sentences(rng):
        yield from sentence.split()


def _filled(hidden: Hidden, supply: Iterator[str], room: int, lengths: Lengths) -> str | None:
    """Search for the message whose prompt has `room` tokens or slightly fewer; None if there is none."""
    filler = list(islice(supply, _PROBE_WORDS))
    tokens_per_word = lengths.tokens(" ".join(filler)) / len(filler)
    best = message((), hidden)
    low, low_tokens = 0, lengths.length(best)
    if low_tokens > room:
        return None
    high, high_tokens = 0, 0
    """The smallest number of words known to be too many; 0 while none is known."""
    for _ in range(_TRIES):
        if room - low_tokens <= _TOLERANCE * room or high == low + 1:
            break
        if high:
            tokens_per_word = (high_tokens - low_tokens) / (high - low)
        missing = room * (1 - _TOLERANCE / 2) - low_tokens
        tried = low + max(1, int(missing / tokens_per_word))
        tried = min(tried, high - 1) if high else tried
        filler += islice(supply, max(0, tried - len(filler)))
        text = message(filler[:tried], hidden)
        tokens = lengths.length(text)
        if tokens <= room:
            low, low_tokens, best = tried, tokens, text
        else:
            high, high_tokens = tried, tokens
    return best
