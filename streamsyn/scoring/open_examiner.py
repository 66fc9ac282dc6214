"""Opens what the configuration asks contexts to be examined by: index, evaluation sets, scoring fleet."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsyn.config.loading import Config
from streamsyn.config.sections import ChecksSection, FleetSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.server_spec import server_specs
from streamsyn.scoring.examiner import Examiner, Scores
from streamsyn.scoring.requests import AnswerPrompt
from streamsyn.telemetry import Counters

if TYPE_CHECKING:
    from streamsyn.scoring.contamination import EvalSets
    from streamsyn.scoring.duplicates import Duplicates

INDEX = Path("index") / "duplicates.sqlite"
"""In the run directory: the index of the contexts so far, derived from the log."""

Opening = Callable[[FleetSection], AbstractAsyncContextManager[Fleet]]
"""Opens a fleet, as a context manager."""
Rows = Callable[[int], Iterable[dict[str, Any]]]
"""Reads the contexts of the log from a `seq` on."""


@dataclass(frozen=True, slots=True)
class Examination:
    """An open examiner.

    Attributes:
        examiner: The examiner.
        fleet: The fleet that scores: its own, or the one that writes; None if no check asks servers.
        shaping: Values besides the configuration that shape the findings; part of the fingerprint.
    """

    examiner: Examiner
    fleet: Fleet | None
    shaping: dict[str, Any]


@asynccontextmanager
async def open_examination(
    config: Config, root: Path, contexts: Rows, writing: Fleet, opening: Opening, counters: Counters
) -> AsyncIterator[Examination]:
    """Open an examiner, and close its index and its own fleet afterwards.

    Args:
        config: The configuration; `checks` and `scoring` are used.
        root: The run directory.
        contexts: Reads the contexts in the log from a `seq` on.
        writing: The fleet that writes, whose models are known.
        opening: Opens a fleet of servers that only score.
        counters: Counts the cost of scoring.

    Raises:
        ConfigError: A file, a server or a model of these sections cannot be used.
        FleetGone: No scoring server became ready.
    """
    checks, scoring = config.checks, config.scoring
    shaping: dict[str, Any] = {}
    eval_sets = await asyncio.to_thread(_eval_sets, checks)
    if eval_sets is not None:
        shaping["checks.eval_sets"] = eval_sets.digest
    async with (
        _scoring_fleet(config, writing, opening) as fleet,
        _duplicates(checks, root / INDEX, contexts) as duplicates,
    ):
        scores: Scores | None = None
        if fleet is not None:
            model = scoring_model(fleet, scoring.model)
            prompt = await asyncio.to_thread(AnswerPrompt, scoring.template)
            if checks.context_gain:
                await check_logprobs(fleet, model)
            scores = Scores(checks, scoring, prompt, fleet, model, counters)
            shaping |= {"scoring.model": model, "scoring.prompt": prompt.digest}
        yield Examination(Examiner(checks, eval_sets, duplicates, scores), fleet, shaping)


@asynccontextmanager
async def _scoring_fleet(config: Config, writing: Fleet, opening: Opening) -> AsyncIterator[Fleet | None]:
    """The fleet that scores, after its models are known; None if no check asks servers."""
    checks, scoring = config.checks, config.scoring
    if not (checks.context_gain or checks.answerable):
        yield None
    elif not scoring.servers:
        yield writing
    else:
        async with own_fleet(config, opening) as fleet:
            yield fleet


@asynccontextmanager
async def own_fleet(config: Config, opening: Opening) -> AsyncIterator[Fleet]:
    """The fleet of `scoring.servers`, after its models are known.

    Raises:
        ConfigError: A server or a model of `scoring` cannot be used.
        FleetGone: No server became ready.
    """
    scoring = config.scoring
    own: dict[str, Any] = {"servers": scoring.servers, "model": scoring.model, "models": {}}
    section = config.fleet.model_copy(update={**own, "servers_file": None, "servers_dns": None})
    with _errors_name_scoring():
        server_specs(section)
    async with opening(section) as fleet:
        with _errors_name_scoring():
            await fleet.ask_models()
        yield fleet


@contextmanager
def _errors_name_scoring() -> Iterator[None]:
    """Make errors name the keys of `scoring`: fleets name those of `fleet`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"\bfleet\.(?=(servers|model)\b)", "scoring.", str(error))) from error


def _eval_sets(checks: ChecksSection) -> "EvalSets | None":
    if not checks.eval_sets:
        return None
    from streamsyn.scoring.contamination import EvalSets

    return EvalSets(checks.eval_sets, checks.eval_ngram_words)


@asynccontextmanager
async def _duplicates(
    checks: ChecksSection, path: Path, contexts: Rows
) -> AsyncIterator["Duplicates | None"]:
    """The index of the contexts so far; None if `checks.near_duplicate` is off."""
    if checks.near_duplicate == "off":
        yield None
        return
    from streamsyn.scoring.duplicates import Duplicates

    duplicates = await asyncio.to_thread(Duplicates, path, checks.similarity)
    try:
        await asyncio.to_thread(_catch_up, duplicates, contexts)
        yield duplicates
    finally:
        await asyncio.to_thread(duplicates.close)


def _catch_up(duplicates: "Duplicates", contexts: Rows) -> None:
    if not duplicates.catch_up(contexts(duplicates.next_seq)):
        duplicates.catch_up(contexts(0))


def scoring_model(fleet: Fleet, wanted: str | None) -> str:
    """The model that scores: `scoring.model`, else the first by name.

    Raises:
        ConfigError: No server has `scoring.model`.
    """
    if wanted is not None and wanted not in fleet.models:
        configured = ", ".join(sorted(fleet.models))
        raise ConfigError(f"scoring.model: {wanted!r} is not among the models of the servers: {configured}")
    return wanted or min(fleet.models)


async def check_logprobs(fleet: Fleet, model: str) -> None:
    """Check that the servers of a model can measure context gain.

    Raises:
        ConfigError: They cannot.
    """
    try:
        await fleet.check_scores(model)
    except ConfigError as error:
        raise ConfigError(f"checks.context_gain: {error}") from error
