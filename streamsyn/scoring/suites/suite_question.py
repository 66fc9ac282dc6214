"""A question of a suite, and what the readers of all suites share: fields of rows, prompts from templates."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamsyn.errors import ConfigError

KEY: Final = "--suite"


@dataclass(frozen=True, slots=True, eq=False)
class SuiteQuestion:
    """A question of a suite.

    Attributes:
        suite: The name of the suite, such as `ruler`.
        part: The part of the suite that has a score of its own, such as a task.
        id: The row's own id, or else its place.
        messages: The chat messages; the last one is the user's.
        max_tokens: Maximum tokens of the answer.
        wanted: Right answers: alternatives, or parts of one, as the suite has it.
        rule: Returns the score of an answer, from 0 to 1, by the suite's published rules.
        also: A further part that the question counts in, such as a length; "" for none.
    """

    suite: str
    part: str
    id: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    wanted: tuple[str, ...]
    rule: Callable[[str], float]
    also: str = ""

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.messages[-1]["content"]


def as_user(text: str) -> tuple[dict[str, str], ...]:
    """The messages of a question that is one text."""
    return ({"role": "user", "content": text},)


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be a text.

    Raises:
        ConfigError: It is not.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{KEY}: {where}: `{name}` is missing or not a text")
    return value


def texts_field(row: Mapping[str, Any], name: str, where: str, *, may_be_empty: bool = False) -> list[str]:
    """A field that must be a list of texts.

    Raises:
        ConfigError: It is not.
    """
    value = row.get(name)
    is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not is_list or not (value or may_be_empty):
        raise ConfigError(f"{KEY}: {where}: `{name}` is not a list of texts")
    return [*value] if isinstance(value, list) else []


def filled(template: str, row: Mapping[str, Any], prompt_chars: int | None) -> str:
    """The template with the fields of a row; what stands in braces in a field stays as it is.

    Args:
        template: A prompt with fields in braces, `{context}` among them.
        row: The fields.
        prompt_chars: The context is cut in the middle so that the prompt has at most this many characters.
    """
    context = row["context"]

    def fill(context: str) -> str:
        values = {**row, "context": context}
        return re.sub(r"\{(\w+)\}", lambda field: str(values.get(field[1], field[0])), template)

    text = fill(context)
    if prompt_chars is None or len(text) <= prompt_chars:
        return text
    kept = max(0, len(context) - (len(text) - prompt_chars))
    return fill(context[: kept - kept // 2] + context[len(context) - kept // 2 :])


def names_in(where: str) -> list[str]:
    """The names of a row's file without its suffix and of the folders above it, the nearest first.

    Args:
        where: The place of the row, as `file:number`.
    """
    path = Path(where.rpartition(":")[0])
    return [path.name.partition(".")[0], *reversed(path.parts[:-1])]


def size_class(size: int, unit: str = "") -> str:
    """The smallest power of two times 1,024 that is at least `size`, as a label such as `up to 8k`."""
    thousands = 1
    while thousands * 1024 < size:
        thousands *= 2
    return f"up to {thousands}k{unit}"
