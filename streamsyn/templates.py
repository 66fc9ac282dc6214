"""Jinja2 templates: the packaged ones and the user's, checked before anything is sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from streamsyn.errors import ConfigError

_UNRENDERABLE = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


class PromptTemplate:
    """A template file; its blocks, where it has any, are rendered one by one.

    Args:
        name: How it is called in messages: a path.
        source: Its text.
        example: Variables it may use, with values to try it on.

    Raises:
        ConfigError: It is no valid template, or uses a variable that there is not.
    """

    def __init__(self, name: str, source: str, example: dict[str, Any]) -> None:
        self.source = source
        self._name = name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"template {name}:{error.lineno}: {error.message}") from error
        self._globals = dict(self._template.globals)
        self.render(**example)
        self.render_blocks(**example)

    @property
    def block_names(self) -> frozenset[str]:
        """Names of its blocks."""
        return frozenset(self._template.blocks)

    @property
    def fixed_lines(self) -> list[str]:
        """Lines that stand in every text rendered from it."""
        return [line.strip() for line in self.source.splitlines() if not {"{", "}"} & set(line)]

    def render(self, **variables: Any) -> str:
        """The text of the whole file.

        Raises:
            ConfigError: It cannot be rendered with these values.
        """
        context = self._context(variables)
        with self._translated(variables):
            return "".join(self._template.root_render_func(context)).strip()

    def render_blocks(self, **variables: Any) -> dict[str, str]:
        """The text of each block, by its name; none for a file that has no blocks.

        Raises:
            ConfigError: They cannot be rendered with these values.
        """
        context = self._context(variables)
        with self._translated(variables):
            return {name: "".join(parts(context)).strip() for name, parts in self._template.blocks.items()}

    def _context(self, variables: dict[str, Any]) -> jinja2.runtime.Context:
        # What `new_context` does, less walking through the globals for each text.
        template = self._template
        return template.environment.context_class(
            template.environment, {**self._globals, **variables}, template.name, template.blocks
        )

    @contextmanager
    def _translated(self, variables: dict[str, Any]) -> Iterator[None]:
        """Name the template in what goes wrong in it."""
        try:
            yield
        except _UNRENDERABLE as error:
            there_are = ", ".join(sorted(variables))
            raise ConfigError(f"template {self._name}: {error}; the variables are {there_are}") from error


def packaged(folder: str, name: str) -> str:
    """The text of a template that comes with the package.

    Raises:
        ConfigError: There is no such template.
    """
    path = files("streamsyn") / "data" / folder / f"{name}.j2"
    if not path.is_file():
        raise ConfigError(f"there is no packaged template {folder}/{name}")
    return path.read_text("utf-8")


def read(path: Path) -> str:
    """The text of a user's template.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the template {path}: {error}") from error


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - the output is a prompt, not HTML
    )
