"""Jinja2 templates, packaged or the user's; errors show when one is loaded, before anything is sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from streamsyn.errors import ConfigError

_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


class PromptTemplate:
    """A template that can be rendered as a whole or block by block.

    Args:
        name: Its name in error messages, such as a path.
        source: The text of the template.
        example: The variables it may use, with values for a trial rendering.

    Raises:
        ConfigError: The syntax is invalid, or the trial rendering fails, as with an unknown variable.
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
        """The names of its blocks."""
        return frozenset(self._template.blocks)

    @property
    def fixed_lines(self) -> list[str]:
        """Lines without variables or tags: they appear in every rendered text."""
        return [line.strip() for line in self.source.splitlines() if not {"{", "}"} & set(line)]

    def render(self, **variables: Any) -> str:
        """Render the whole file.

        Raises:
            ConfigError: Rendering fails with these values.
        """
        context = self._context(variables)
        with self._naming_the_template(variables):
            return "".join(self._template.root_render_func(context)).strip()

    def render_blocks(self, **variables: Any) -> dict[str, str]:
        """Render each block, by name; {} for a template without blocks.

        Raises:
            ConfigError: Rendering fails with these values.
        """
        context = self._context(variables)
        with self._naming_the_template(variables):
            return {name: "".join(parts(context)).strip() for name, parts in self._template.blocks.items()}

    def _context(self, variables: dict[str, Any]) -> jinja2.runtime.Context:
        # As `Template.new_context`, without its pass over the globals for each text.
        template = self._template
        return template.environment.context_class(
            template.environment, {**self._globals, **variables}, template.name, template.blocks
        )

    @contextmanager
    def _naming_the_template(self, variables: dict[str, Any]) -> Iterator[None]:
        """Translate errors of rendering to ConfigError, with the name of the template."""
        try:
            yield
        except _RENDER_ERRORS as error:
            known = ", ".join(sorted(variables))
            raise ConfigError(f"template {self._name}: {error}; the variables are {known}") from error


def packaged(folder: str, name: str) -> str:
    """Return the text of a packaged template.

    Raises:
        ConfigError: There is no template of this name.
    """
    path = files("streamsyn") / "data" / folder / f"{name}.j2"
    if not path.is_file():
        raise ConfigError(f"there is no packaged template {folder}/{name}")
    return path.read_text("utf-8")


def read(path: Path) -> str:
    """Return the text of a user's template.

    Raises:
        ConfigError: The file cannot be read.
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
