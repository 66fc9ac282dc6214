"""The preflight of a new run: what would fail for every seed is one line, before the first seed is taken.

Each source is sampled, and one request with the run's own prompt and sampling parameters is sent to a server
of each model. Nothing of this is written to the log. A server that is down or busy is not a mistake.
"""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import structlog

from streamsyn.config.data_paths import shown_url
from streamsyn.config.loading import Config
from streamsyn.config.sections import SourceSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.thinking import Thinking
from streamsyn.pipeline.request import GivenWork
from streamsyn.pipeline.setup import Parts
from streamsyn.pipeline.summary import GOVERNED_BY
from streamsyn.plain_text import message
from streamsyn.recipes.recipe import Recipe, RejectedDraft
from streamsyn.records import BadSeed, Draft, RejectReason, Request, Seed
from streamsyn.seeds.reader import SeedReader

log = structlog.get_logger()

SAMPLED_ROWS: Final = 100
"""Rows of each source that are looked at."""
_OPENING_TOKENS: Final = 512
"""Tokens of the prompt of a document that is written in sections, roughly."""
_EXAMPLE: Final = Seed(
    "preflight", "preflight", "What did the harbour master write into the ledger?", "Nothing.", "preflight"
)
"""Stands for the seeds of a pipe, which must not be read yet."""
_SKIP: Final = "`--no-preflight` skips this check"


async def preflight(parts: Parts, fleet: Fleet) -> None:
    """Check what all seeds have in common; a run that resumes has shown that it works.

    Raises:
        ConfigError: Every seed would be rejected.
    """
    request = parts.request
    if request.given is not None:
        await send_opening(request.given, request.config, fleet)
        return
    if not request.preflight or request.retry or parts.log.outcomes:
        return
    requests = await asyncio.to_thread(sampled_requests, request.config, parts.recipe)
    thinking = Thinking(request.config.recipe)
    for model in fleet.models:
        await _check_length(request.config, fleet, model)
        asked = [thinking.request(one, model) for one in _some(requests)]
        try:
            completion = await fleet.check_accepted(asked, model)
        except ConfigError as error:
            raise ConfigError(f"every seed would be rejected: {error} ({_SKIP})") from error
        if completion is not None:
            parts.counters.wasted_tokens += completion.completion_tokens


async def send_opening(given: GivenWork, config: Config, fleet: Fleet) -> None:
    """Send the first request of the given work to each model.

    Raises:
        ConfigError: A server refuses it.
    """
    opening = await asyncio.to_thread(given.opening)
    if opening is None:
        return
    thinking = Thinking(config.recipe)
    for model in fleet.models:
        await fleet.check_accepted([thinking.request(opening, model)], model)


def sampled_requests(config: Config, recipe: Recipe) -> list[Request]:
    """Return the first requests of some seeds of each source; of an example where seeds come from a pipe.

    Raises:
        ConfigError: No sampled row of a source can be used.
    """
    found = [
        request
        for source in config.seeds.sources
        if source.path != "-"
        for request in _requests_of(source, config, recipe)
    ]
    return found or list(_example(recipe))


def _requests_of(source: SourceSection, config: Config, recipe: Recipe) -> list[Request]:
    seeds = config.seeds.model_copy(update={"sources": (source,)})
    reader = SeedReader(seeds, config.run.seed, spool_folder=None, takes_documents=recipe.takes_documents)
    entries = (entry for batch in reader.batches(lambda _: False) for entry in batch)
    requests: list[Request] = []
    problem, rows = "", 0
    for entry in islice(entries, SAMPLED_ROWS):
        rows += 1
        try:
            if isinstance(entry, BadSeed):
                raise RejectedDraft(entry.reason, entry.detail)
            requests += islice(recipe.steps(Draft(entry)), 1)
        except RejectedDraft as rejected:
            problem = problem or _why(entry.origin, rejected)
        except ConfigError as error:
            problem = problem or f"{entry.origin}: {error}"
        except Exception as bug:  # noqa: BLE001 - the bug of one draft, which its worker will report
            log.debug("preflight.bug", origin=entry.origin, bug=repr(bug))
            requests += _example(recipe)
    if rows and not requests and problem:
        raise ConfigError(
            f"seeds: none of the first {rows} rows of {shown_url(source.path)} can be used: "
            f"{message(problem)} ({_SKIP})"
        )
    return requests


def _why(origin: str, rejected: RejectedDraft) -> str:
    key = GOVERNED_BY.get(RejectReason(rejected.reason))
    return f"{origin}: {rejected.reason}: {rejected.detail}" + (f"; see {key}" if key else "")


def _example(recipe: Recipe) -> Iterator[Request]:
    """The first request of the example, if the recipe can ask for it: a template may need more fields."""
    if recipe.takes_documents:
        return
    try:
        yield from islice(recipe.steps(Draft(_EXAMPLE)), 1)
    except Exception as error:  # noqa: BLE001 - of a seed that is none of the user's
        log.debug("preflight.no_example", why=repr(error))


def _some(requests: Sequence[Request]) -> list[Request]:
    """The shortest request, and one of medium length: what both are refused for, all are."""
    by_length = sorted(requests, key=lambda one: sum(len(part["content"]) for part in one.messages))
    return list({id(one): one for one in (*by_length[:1], *by_length[len(by_length) // 2 :][:1])}.values())


async def _check_length(config: Config, fleet: Fleet, model: str) -> None:
    """Check that the conversations of the recipe `sections` fit into the model's context length."""
    recipe = config.recipe
    if recipe.use != "sections":
        return  # one request is all, and a server refuses one that is too long
    length = await fleet.context_tokens(model)
    target = max(recipe.target_tokens, *(task.target_tokens or 1 for task in recipe.tasks.values()), 1)
    needed = min(recipe.window_tokens, target + _OPENING_TOKENS)
    if length is not None and needed > length:
        raise ConfigError(
            f"recipe.window_tokens = {recipe.window_tokens}: conversations of {needed} tokens do not fit "
            f"into the {length} tokens of {model}; set recipe.window_tokens = {length} ({_SKIP})"
        )
