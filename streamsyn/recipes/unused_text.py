"""Fields of seeds with text that no part of the prompt uses: half of a question may be among them."""

from contextlib import closing
from typing import Final

import structlog

from streamsyn.recipes.recipe import Recipe
from streamsyn.records import Draft, Request, Seed
from streamsyn.words import word_count

log = structlog.get_logger()

_MIN_WORDS: Final = 4
"""Words of a text that may be a part of a question; labels and names are shorter."""
_SEEDS: Final = 100
"""Seeds that are looked at."""


def unused_text(seed: Seed, request: Request) -> list[str]:
    """The names of the fields with text that is not in the request.

    Args:
        seed: The seed.
        request: The first request for it.
    """
    prompt = "\n".join(message["content"] for message in request.messages)
    return [
        name
        for name, value in seed.metadata.items()
        if isinstance(value, str) and value.strip() not in prompt and word_count(value) >= _MIN_WORDS
    ]


class UnusedText:
    """Looks at the first seeds of a run, and logs once which of their text is not used.

    Args:
        recipe: Writes the prompts.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._left = _SEEDS

    def look(self, seed: Seed) -> None:
        """Look at a seed that is about to be worked on. Fast for all but the first ones."""
        if not self._left or not seed.metadata:
            return
        self._left -= 1
        try:
            unused = unused_text(seed, self._first_request(seed))
        except Exception as error:  # noqa: BLE001 - the worker that gets the seed reports it
            log.debug("seeds.not_looked_at", at=seed.origin, why=repr(error))
            return
        if unused:
            self._left = 0
            advice = "seeds.format or seeds.fields may use it, or a template, as metadata.NAME"
            log.warning("seeds.unused_text", fields=unused, at=seed.origin, advice=advice)

    def _first_request(self, seed: Seed) -> Request:
        with closing(self._recipe.steps(Draft(seed))) as steps:
            return next(steps)
