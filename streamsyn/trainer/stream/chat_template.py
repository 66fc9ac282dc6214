"""A chat template of the user's, in place of the tokenizer's own: `train.chat_template`."""

from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamsyn.errors import ConfigError

_TAG_OF_TRANSFORMERS = "generation"


def read_template(path: str | None) -> str | None:
    """The text of a template; None where none is named.

    Raises:
        ConfigError: It cannot be read, or is no Jinja.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"train.chat_template: cannot read {path}: {error}") from error
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        if _TAG_OF_TRANSFORMERS not in str(error.message):
            raise ConfigError(f"train.chat_template: {path}:{error.lineno}: {error.message}") from error
    return text
