"""A template as the first request of a conversation, with keys of the prefixes that requests share.

Shared text comes first: the system message of a task, then the text of a group of seeds, then the seed's own
text. So servers find shared text in their prefix caches.

`UnusedText` warns of text in seeds that the prompt does not use: it may be half of the question.
"""

from collections.abc import Callable, Collection
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import structlog

from streamsyn.errors import ConfigError
from streamsyn.recipes.recipe import Recipe
from streamsyn.records import Draft, Request, Seed, digest
from streamsyn.templates import PromptTemplate, packaged, read
from streamsyn.words import normalised, word_count


class _AnyMetadata(dict[str, str]):
    """Metadata for the trial rendering of a template: it has every field."""

    def __missing__(self, name: str) -> str:
        return name


MIN_PREFIX_CHARS = 1000
"""Shortest prefix with a key. A shorter one, about 250 tokens, takes a GPU 10 ms: less than waiting for
the first request with it, whose answer must also be streamed."""

EXAMPLE: dict[str, Any] = {
    "instruction": "i",
    "answer": "a",
    "task": "t",
    "target_words": 1,
    "metadata": _AnyMetadata(),
}
"""What `pair_variables` returns, with values for a trial rendering."""


def pair_variables(seed: Seed, target_words: int) -> dict[str, Any]:
    """Return the variables of the templates of `context` and `sections`.

    Args:
        seed: An instruction and its answer.
        target_words: Length to ask for.
    """
    return {
        "instruction": seed.instruction,
        "answer": seed.answer,
        "task": seed.task,
        "target_words": target_words,
        "metadata": seed.metadata,
    }


class Prompt:
    """The user's template or the packaged one, or the user's blocks in place of packaged ones.

    Args:
        path: The user's file; None for the packaged template.
        name: Name of the packaged template.
        example: The variables it may use, with values for a trial rendering.
        blocks: The blocks it may have; those it lacks are taken from the packaged one. None for any.

    Raises:
        ConfigError: The template is invalid.
    """

    def __init__(
        self, path: Path | None, name: str, example: dict[str, Any], blocks: Collection[str] | None = None
    ) -> None:
        if path is None:
            self._template = PromptTemplate(name, packaged("prompts", name), example)
        else:
            self._template = PromptTemplate(str(path), read(path), example)
        self._below: PromptTemplate | None = None
        if path is not None and blocks is not None:
            self._below = PromptTemplate(name, packaged("prompts", name), example)
            _check_blocks(str(path), self._template.block_names, blocks)
        self._name, self._example = name if path is None else str(path), example
        layers = [layer for layer in (self._template, self._below) if layer is not None]
        self.digest = digest(*(layer.source for layer in layers)).hex()
        """Hash of the template's text."""
        self.own_lines = tuple(
            normalised(line.lstrip("-* ")) for layer in layers for line in layer.fixed_lines
        )
        """Lines without variables, normalised: an answer that contains one repeats the prompt."""

    @property
    def block_names(self) -> frozenset[str]:
        """The names of the user's blocks."""
        return self._template.block_names

    def whole(self, variables: dict[str, Any]) -> str:
        """Render the whole file."""
        return self._template.render(**variables)

    def blocks(self, variables: dict[str, Any]) -> dict[str, str]:
        """Render each block.

        Raises:
            ConfigError: Rendering fails with these values.
        """
        own = self._template.render_blocks(**variables)
        return {**self._below.render_blocks(**variables), **own} if self._below is not None else own

    def check_depends_on(self, variable: str) -> None:
        """Refuse a template that renders the same text whatever the value of a variable.

        Raises:
            ConfigError: It does; the message names the file.
        """
        other = {**self._example, variable: f"not {self._example[variable]}"}
        render = self.blocks if self.block_names else self.whole
        if render(self._example) == render(other):
            raise ConfigError(f"template {self._name}: it never mentions {{{{ {variable} }}}}")


def first_request(
    system: str, group: str, own: str, sampling: dict[str, Any], *, drafts_alike: bool
) -> Request:
    """Return the first request of a conversation; its group is that of the block `group`, "" without one.

    Args:
        system: The text that all seeds share; "" for none.
        group: The text that several seeds share; "" for none.
        own: The text of this seed.
        sampling: See `Request`.
        drafts_alike: Whether all drafts of the seed send the same text.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{group}\n\n{own}" if group else own})
    group_key = digest("group", system, group).hex() if group else ""
    prefixes = (_template_key(system),) if len(system) >= MIN_PREFIX_CHARS else ()
    if len(group) >= MIN_PREFIX_CHARS:
        prefixes = (*prefixes, group_key)
    if drafts_alike and len(own) >= MIN_PREFIX_CHARS:
        prefixes = (*prefixes, digest("own", system, group, own).hex())
    return Request(messages, sampling, group_key, prefixes)


@lru_cache(maxsize=256)
def _template_key(system: str) -> str:
    return digest("system", system).hex()


def group_of(prompt: Prompt, first: Callable[[], Request]) -> str:
    """Return the key of the template's block `group` for a seed; "" without such a block.

    Args:
        prompt: The prompt of its task.
        first: Renders its first request.
    """
    if "group" not in prompt.block_names:
        return ""
    try:
        return first().group
    except ConfigError:  # reported by the worker that gets the seed
        return ""


def seed_group(seed: Seed) -> str:
    """Return the group of all requests of one seed."""
    return digest("seed", seed.id).hex()


def _check_blocks(name: str, found: frozenset[str], blocks: Collection[str]) -> None:
    if not found or found - set(blocks):
        known = ", ".join(sorted(blocks))
        problem = f"unknown block {min(found - set(blocks))!r}" if found else "no blocks"
        raise ConfigError(f"template {name}: {problem}; this recipe has the blocks {known}")


log = structlog.get_logger()

_UNUSED_WORDS: Final = 4
"""Words of a text that may be a part of a question; labels and names are shorter."""
_SEEDS_LOOKED_AT: Final = 100
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
        if isinstance(value, str) and value.strip() not in prompt and word_count(value) >= _UNUSED_WORDS
    ]


class UnusedText:
    """Looks at the first seeds of a run, and logs once which of their text is not used.

    Args:
        recipe: Writes the prompts.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._left = _SEEDS_LOOKED_AT

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
