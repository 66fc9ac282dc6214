"""From a template to the first messages of a conversation, and to the keys of what they share with others.

Shared text comes first: the system message, the same for all seeds of a task, then the text of a group of
seeds, then what is the seed's own. So a server finds each of them in its prefix cache.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import normalised
from streamsyn.records import Seed, digest
from streamsyn.templates import PromptTemplate, packaged, read


class _AnyMetadata(dict[str, str]):
    """Stands in for a seed's other fields when a template is tried: nobody knows them yet."""

    def __missing__(self, name: str) -> str:
        return name


_WORTH_WAITING_CHARS = 1000
"""What is shorter is computed again sooner than waited for: some 250 tokens, which a GPU reads in 10 ms.
It takes a streamed answer, too, to know that it has been read."""

EXAMPLE: dict[str, Any] = {
    "instruction": "i",
    "answer": "a",
    "task": "t",
    "target_words": 1,
    "metadata": _AnyMetadata(),
}
"""Variables that every template may use, with values to try it on."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How a conversation begins.

    Attributes:
        messages: System, if there is one, and the first of the user's.
        group: As `Request.group`, when the template names a text that several seeds share; else "".
        prefixes: Keys of the texts in it that others begin with too, outermost first.
        alike: The same, for requests that begin with all of it.
    """

    messages: list[dict[str, str]]
    group: str
    prefixes: tuple[str, ...]
    alike: tuple[str, ...]


class Prompt:
    """A template, laid over another one whose blocks stand in for those that it lacks.

    Args:
        path: The user's file; None for the packaged one alone.
        name: The packaged one.
        example: Variables it may use, with values to try it on.
        blocks: Blocks it may have, where that is limited.

    Raises:
        ConfigError: It cannot be used.
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
        layers = [layer for layer in (self._template, self._below) if layer is not None]
        self.digest = digest(*(layer.source for layer in layers)).hex()
        """Stands for the prompt's text."""
        self.own_lines = tuple(
            normalised(line.lstrip("-* ")) for layer in layers for line in layer.fixed_lines
        )
        """Lines that must not come back in an answer, normalised."""

    @property
    def block_names(self) -> frozenset[str]:
        """Names of its own blocks."""
        return self._template.block_names

    def whole(self, variables: dict[str, Any]) -> str:
        """The text of the file as one."""
        return self._template.render(**variables)

    def blocks(self, variables: dict[str, Any]) -> dict[str, str]:
        """The text of each block.

        Raises:
            ConfigError: They cannot be rendered with these values.
        """
        own = self._template.render_blocks(**variables)
        return {**self._below.render_blocks(**variables), **own} if self._below is not None else own


def opening(system: str, group: str, own: str) -> Opening:
    """The first messages: `system`, which all seeds of a task share, `group`, which some do, and `own`."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{group}\n\n{own}" if group else own})
    group_key = digest("group", system, group).hex() if group else ""
    prefixes = (_template_key(system),) if len(system) >= _WORTH_WAITING_CHARS else ()
    if len(group) >= _WORTH_WAITING_CHARS:
        prefixes = (*prefixes, group_key)
    alike = prefixes
    if len(own) >= _WORTH_WAITING_CHARS:
        alike = (*prefixes, digest("own", system, group, own).hex())
    return Opening(messages, group_key, prefixes, alike)


@lru_cache(maxsize=256)
def _template_key(system: str) -> str:
    return digest("system", system).hex()


def group_of(prompt: Prompt, seed: Seed, opening_of: Callable[[Seed], Opening]) -> str:
    """Key of what the template's block `group` makes of a seed; "" where there is no such block."""
    if "group" not in prompt.block_names:
        return ""
    try:
        return opening_of(seed).group
    except ConfigError:  # the worker that gets the seed will tell
        return ""


def seed_group(seed: Seed) -> str:
    """The group of all requests of one seed."""
    return digest("seed", seed.id).hex()


def _check_blocks(name: str, found: frozenset[str], blocks: Collection[str]) -> None:
    if not found or found - set(blocks):
        there_are = ", ".join(sorted(blocks))
        wrong = f"no block {min(found - set(blocks))!r}" if found else "no template without blocks"
        raise ConfigError(f"template {name}: this recipe knows {wrong}; there are {there_are}")
