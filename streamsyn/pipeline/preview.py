"""`streamsyn preview`: what a run would send, and what it would take, without asking a server.

The requests for the first seeds are rendered as text. For an estimate, the first seeds are taken through the
recipe with invented answers of the length that is asked for, so every request that a draft makes is counted,
with the text so far in it. Or the figures of an earlier run are taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any, Final

from streamsyn.config.loading import Config
from streamsyn.config.sections import RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.thinking import Thinking
from streamsyn.pipeline.progress import duration
from streamsyn.recipes.prompt import unused_text
from streamsyn.recipes.recipe import Recipe, RejectedDraft
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import BadSeed, Completion, Draft, RejectReason, Request, Seed
from streamsyn.seeds.reader import SeedReader
from streamsyn.simulator.texts import Prose
from streamsyn.sink.snapshot import Part, Snapshot
from streamsyn.words import word_count

CHARACTERS_A_TOKEN: Final = 4
TOKENS_A_WORD: Final = 4 / 3
_SAMPLED: Final = 100
"""Seeds taken through the recipe."""
_COUNTED: Final = 100_000
"""Lines that are read to count the seeds; beyond, their number follows from the share that was read."""
_PAIR_TOKENS: Final = 150
"""Tokens of a question and its answer, as the recipe `instruction` asks for."""
_MEASURED: Final = 5_000
"""Contexts of an earlier run that are looked at: the latest."""
_PAUSE_S: Final = 60.0
"""A longer time between two outcomes is not counted as work: the run had stopped."""


def preview(config: Config, limit: int) -> Iterator[str]:
    """Yield one readable text for each of the first `limit` seeds.

    Raises:
        ConfigError: The configuration or a source of seeds cannot be used.
    """
    recipe, thinking = load_recipe(config.recipe, config.checks), Thinking(config.recipe)
    reader = _reader(config, recipe)
    batches = reader.batches(lambda _: False)
    entries = list(islice((entry for batch in batches for entry in batch), limit))
    yield from (f"{form}\n" for form in reader.forms())
    for entry in entries:
        if isinstance(entry, BadSeed):
            yield _reject_text(entry.origin, entry.reason, entry.detail)
            continue
        try:
            request = thinking.request(next(recipe.steps(Draft(entry))), config.fleet.model or "")
            yield _preview_text(entry, request, recipe.outlook(), unused_text(entry, request))
        except RejectedDraft as rejected:
            yield _reject_text(entry.origin, rejected.reason, rejected.detail)
    reader.stop()


def _preview_text(seed: Seed, request: Request, outlook: str, unused: Sequence[str]) -> str:
    sampling = ", ".join(f"{name}={value}" for name, value in request.sampling.items())
    document = f", a document of {word_count(seed.context)} words" if seed.context else ""
    parts = [f"=== {seed.origin}: seed {seed.id}, task {seed.task}{document} ({sampling})"]
    parts += [f"--- {message['role']}\n{message['content']}" for message in request.messages]
    if outlook:
        parts.append(f"--- {outlook}")
    if unused:
        parts.append(f"--- not in the prompt: the text in {', '.join(unused)}")
    return "\n".join(parts) + "\n"


def _reader(config: Config, recipe: Recipe) -> SeedReader:
    reader = SeedReader(config.seeds, config.run.seed, None, takes_documents=recipe.takes_documents)
    if not reader.has_sources:
        raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")
    return reader


def _reject_text(origin: str, reason: RejectReason, detail: str) -> str:
    return f"=== {origin}: would be rejected: {reason}: {detail}\n"


@dataclass(frozen=True, slots=True)
class PerDraft:
    """What a draft takes.

    Attributes:
        requests: Requests; None where an earlier run was measured.
        prompt_tokens: Tokens in, of all its requests.
        completion_tokens: Tokens out, wasted ones included where they were measured.
        origin: Where the figures come from.
    """

    requests: float | None
    prompt_tokens: float
    completion_tokens: float
    origin: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What an earlier run took: for a draft, and its output tokens per second."""

    draft: PerDraft
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an estimate is made under; what is None is left out.

    Attributes:
        tokens_per_s: Output tokens per second of all servers together.
        like: An earlier run, whose tokens and rate are taken.
        price_in: Price of a million tokens in.
        price_out: Price of a million tokens out.
    """

    tokens_per_s: float | None = None
    like: Path | None = None
    price_in: float | None = None
    price_out: float | None = None


def estimate(config: Config, terms: Terms) -> Iterator[str]:
    """Yield the estimate, one line of text after the other.

    Raises:
        ConfigError: A source of seeds cannot be used, or the earlier run has no contexts.
    """
    recipe = load_recipe(config.recipe, config.checks)
    seeds = _Seeds(config, recipe)
    measured = None if terms.like is None else measure(terms.like)
    draft = _invented(config.recipe, recipe, seeds.sample) if measured is None else measured.draft
    drafts = seeds.number * config.recipe.contexts_per_seed
    about = "" if seeds.is_exact else "about "
    tokens_in, tokens_out = drafts * draft.prompt_tokens, drafts * draft.completion_tokens
    yield f"{about}{seeds.number:,} seeds, {drafts:,} drafts; per draft: {draft.origin}"
    if seeds.bad:
        yield f"  not seeds   {seeds.bad:,} of the first {seeds.read:,} lines would be rejected"
    if draft.requests is not None:
        yield f"  requests    {drafts * draft.requests:,.0f} ({draft.requests:,.1f} a draft)"
    yield f"  tokens in   {tokens_in:,.0f} ({draft.prompt_tokens:,.0f} a draft), cached ones included"
    yield f"  tokens out  {tokens_out:,.0f} ({draft.completion_tokens:,.0f} a draft)"
    yield _time_line(tokens_out, terms, measured)
    if terms.price_in is not None or terms.price_out is not None:
        price = (tokens_in * (terms.price_in or 0.0) + tokens_out * (terms.price_out or 0.0)) / 1e6
        yield f"  price       {price:,.2f}, without discounts for cached tokens"
    if measured is None:
        yield "  not counted answers that are asked for again, thoughts, and scoring"


def measure(root: Path) -> Measured:
    """Return what the latest contexts of a run directory took.

    Raises:
        ConfigError: It has no contexts.
    """
    rows = _latest(Snapshot(root).parts["contexts"])
    times = sorted(time for row in rows if isinstance(time := row.get("written_at"), int | float))
    seconds = sum(gap for before, after in pairwise(times) if (gap := after - before) <= _PAUSE_S)
    if len(rows) < 2 or seconds <= 0:
        raise ConfigError(f"--like {root}: it has no contexts to measure; give --tokens-per-s instead")
    written = [int(row.get("completion_tokens") or 0) + int(row.get("wasted_tokens") or 0) for row in rows]
    prompts = sum(int(row.get("prompt_tokens") or 0) for row in rows)
    origin = f"as {len(rows):,} contexts of {root}"
    draft = PerDraft(None, prompts / len(rows), sum(written) / len(rows), origin)
    return Measured(draft, sum(written[1:]) / seconds)


class _Seeds:
    """Reads the seeds of a configuration: how many there are, and the first ones."""

    def __init__(self, config: Config, recipe: Recipe) -> None:
        reader = _reader(config, recipe)
        self.sample: list[Seed] = []
        self.read = self.bad = good = 0
        self.is_exact = True
        limit, share = config.seeds.limit, None
        for batch in reader.batches(lambda _: False):
            self.read += len(batch)
            seeds = [entry for entry in batch if not isinstance(entry, BadSeed)]
            self.bad += len(batch) - len(seeds)
            good += len(seeds)
            self.sample += seeds[: _SAMPLED - len(self.sample)]
            if limit is not None and good >= limit:
                good = limit
                break
            if self.read >= _COUNTED and (share := reader.fraction()):
                self.is_exact = False
                break
        reader.stop()
        self.number = good if self.is_exact or not share else min(round(good / share), limit or 2**63)


def _invented(section: RecipeSection, recipe: Recipe, seeds: list[Seed]) -> PerDraft:
    """What a draft takes if all answers have the length asked for, and none fails a check."""
    if not seeds:
        raise ConfigError("there is no seed to estimate from")
    requests = prompt_tokens = completion_tokens = 0
    for seed in seeds:
        for request, written in _asked(section, recipe, Draft(seed)):
            requests += 1
            prompt_tokens += sum(tokens_of(message["content"]) for message in request.messages)
            completion_tokens += written
    number = len(seeds)
    origin = f"estimated from {number:,} of them, at {CHARACTERS_A_TOKEN} characters a token"
    return PerDraft(requests / number, prompt_tokens / number, completion_tokens / number, origin)


def _asked(section: RecipeSection, recipe: Recipe, draft: Draft) -> Iterator[tuple[Request, int]]:
    """The requests of a draft, each with the tokens of its answer."""
    steps, prose, asked = recipe.steps(draft), Prose(0), list[Any]()
    try:
        request = next(steps)
        while request.messages not in asked:  # a second try of a step: the invented answer failed a check
            asked.append(request.messages)
            tokens = _answer_tokens(section, request, draft.seed.task)
            yield request, tokens
            text = prose.pair() if recipe.takes_documents else prose.write(ceil(tokens * 0.6))
            request = steps.send(Completion(text, "stop", 0, 0, tokens, "", ""))
    except (StopIteration, RejectedDraft):
        return


def _answer_tokens(section: RecipeSection, request: Request, task: str) -> int:
    most = int(request.sampling.get("max_tokens", section.max_tokens))
    if section.use == "sections":
        return most
    if section.use == "instruction":
        return min(most, _PAIR_TOKENS)
    own = section.tasks.get(task)
    words = (own and own.target_words) or section.target_words
    return min(most, round(words * TOKENS_A_WORD))


def tokens_of(text: str) -> int:
    """Return about how many tokens a text has, in any script."""
    return max(ceil(len(text) / CHARACTERS_A_TOKEN), 0 if text.isascii() else word_count(text))


def _latest(parts: list[Part]) -> list[dict[str, Any]]:
    """The rows of the last parts, about _MEASURED of them."""
    rows: list[dict[str, Any]] = []
    for part in reversed(parts):
        kept = ("written_at", "completion_tokens", "wasted_tokens", "prompt_tokens")
        rows = [{name: row.get(name) for name in kept} for row in part.rows()] + rows
        if len(rows) >= _MEASURED:
            break
    return list(islice(reversed(rows), _MEASURED))[::-1]


def _time_line(tokens_out: float, terms: Terms, measured: Measured | None) -> str:
    rate, origin = terms.tokens_per_s, "--tokens-per-s"
    if rate is None and measured is not None:
        rate, origin = measured.tokens_per_s, f"measured in {terms.like}"
    if rate is None:
        return (
            "  time        unknown: give --tokens-per-s N, or --like DIR of an earlier run on these servers"
        )
    return f"  time        {duration(tokens_out / rate)} at {rate:,.0f} output tokens/s ({origin})"
