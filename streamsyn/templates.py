"""Jinja2 templates, packaged or the user's; errors show when one is loaded, before anything is sent.

They are rendered in Jinja2's sandbox: a template gets at the values of its variables, never at Python.
"""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamsyn.errors import ConfigError

_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
MAX_RENDERED_CHARS: Final = 2**26
"""Longest text that a template may become: longer than any context window."""


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
            self._template = environment().from_string(source)
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
        try:
            return _joined(self._template.root_render_func(context)).strip()
        except _RENDER_ERRORS as error:
            raise self._failure(error, variables) from error

    def render_blocks(self, **variables: Any) -> dict[str, str]:
        """Render each block, by name; {} for a template without blocks.

        Raises:
            ConfigError: Rendering fails with these values.
        """
        context = self._context(variables)
        try:
            return {name: _joined(parts(context)).strip() for name, parts in self._template.blocks.items()}
        except _RENDER_ERRORS as error:
            raise self._failure(error, variables) from error

    def _context(self, variables: dict[str, Any]) -> jinja2.runtime.Context:
        # As `Template.new_context`, without its pass over the globals for each text.
        template = self._template
        return template.environment.context_class(
            template.environment, {**self._globals, **variables}, template.name, template.blocks
        )

    def _failure(self, error: Exception, variables: dict[str, Any]) -> ConfigError:
        known = ", ".join(sorted(variables))
        return ConfigError(f"template {self._name}: {error}; the variables are {known}")


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


def _joined(parts: Iterable[str]) -> str:
    """Join the parts of a text, unless it becomes too long to be a prompt."""
    kept, chars = [], 0
    for part in parts:
        kept.append(part)
        chars += len(part)
        if chars > MAX_RENDERED_CHARS:
            raise ValueError(f"the text is longer than {MAX_RENDERED_CHARS:,} characters")
    return "".join(kept)


@cache
def environment() -> jinja2.Environment:
    """Return the environment of all templates of prompts: sandboxed."""
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the output is a prompt, not HTML
    )
