"""Chat templates, rendered as `apply_chat_template` of transformers does, without transformers."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from streamsyn.errors import ConfigError

_TODAY = datetime(2024, 7, 26)
"""What templates are told of the date: the same for ever, so that a sample's length is, too."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is trained on; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


class ChatTemplate:
    """A model's chat template.

    Args:
        name: The tokenizer, for messages.
        source: The template.
        special_tokens: Such as bos_token and eos_token, which templates use by these names.

    Raises:
        ConfigError: It is no valid template, or cannot render a question and its answer.
    """

    def __init__(self, name: str, source: str, special_tokens: Mapping[str, str]) -> None:
        self._name = name
        self._special_tokens = special_tokens
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_TODAY.strftime)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template of {name} is no valid template: line {error.lineno}: {error.message}"
            ) from error
        self.render("Question?", "Answer.")

    def render(self, user: str, assistant: str) -> str:
        """The text of a chat of two messages, with all that stands round them.

        Raises:
            ConfigError: The template refuses.
        """
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **self._special_tokens,
            )
        except Exception as error:  # a template is not our code, and may fail in any way
            raise ConfigError(f"the chat template of {self._name} cannot be rendered: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what means something in HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
