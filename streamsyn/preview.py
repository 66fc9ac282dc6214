"""`streamsyn preview`: what would be sent for the first seeds, without asking a server."""

from collections.abc import Iterator
from itertools import islice

from streamsyn.config import Config
from streamsyn.errors import ConfigError
from streamsyn.recipes.load import load_recipe
from streamsyn.records import BadSeed, Draft
from streamsyn.seeds.reader import SeedReader


def preview(config: Config, limit: int) -> Iterator[str]:
    """Readable pieces of text, one a seed.

    Raises:
        ConfigError: The configuration or a source cannot be used.
    """
    recipe = load_recipe(config.recipe, config.checks)
    reader = SeedReader(config.seeds, config.run.seed, spool_folder=None)
    if not reader.has_sources:
        raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")
    entries = (entry for batch in reader.batches(lambda _: False) for entry in batch)
    for entry in islice(entries, limit):
        if isinstance(entry, BadSeed):
            yield f"=== {entry.origin}: would be rejected: {entry.reason}: {entry.detail}\n"
            continue
        request = next(recipe.steps(Draft(entry)))
        sampling = ", ".join(f"{name}={value}" for name, value in request.sampling.items())
        parts = [f"=== {entry.origin}: seed {entry.id}, task {entry.task} ({sampling})"]
        parts += [f"--- {message['role']}\n{message['content']}" for message in request.messages]
        if outlook := recipe.outlook():
            parts.append(f"--- {outlook}")
        yield "\n".join(parts) + "\n"
    reader.stop()
