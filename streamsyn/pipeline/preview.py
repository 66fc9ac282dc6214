"""`streamsyn preview`: the requests for the first seeds, rendered without asking a server."""

from collections.abc import Iterator, Sequence
from itertools import islice

from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.fleet.thinking import Thinking
from streamsyn.recipes.prompt import unused_text
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import BadSeed, Draft, RejectReason, Request, Seed
from streamsyn.seeds.reader import SeedReader
from streamsyn.words import word_count


def preview(config: Config, limit: int) -> Iterator[str]:
    """Yield one readable text for each of the first `limit` seeds.

    Raises:
        ConfigError: The configuration or a source of seeds cannot be used.
    """
    recipe, thinking = load_recipe(config.recipe, config.checks), Thinking(config.recipe)
    reader = SeedReader(
        config.seeds, config.run.seed, spool_folder=None, takes_documents=recipe.takes_documents
    )
    if not reader.has_sources:
        raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")
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


def _reject_text(origin: str, reason: RejectReason, detail: str) -> str:
    return f"=== {origin}: would be rejected: {reason}: {detail}\n"
