"""Questions of OpenAI MRCR (hub: openai/mrcr): conversations whose i-th answer of a kind is to be repeated.

A row has `prompt`, a JSON list of chat messages, `answer`, `random_string_to_prepend`, `n_needles` and
`n_chars`. The rule is that of the dataset card: 0 unless the answer begins with the random string, otherwise
the ratio of difflib's SequenceMatcher for the texts behind it. The card sets no limit to the answer's tokens;
here there is room for twice the right answer.
"""

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, Final

import orjson

from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.suite_question import KEY, SuiteQuestion, size_class, text_field

MRCR: Final = "mrcr"
_MIN_TOKENS: Final = 512
_CHARS_PER_TOKEN: Final = 2
"""At least; text has about four."""


def mrcr_question(row: Mapping[str, Any], where: str) -> SuiteQuestion:
    """The question of a row, which counts by its number of needles and by its length.

    Raises:
        ConfigError: A field is wrong.
    """
    right, prefix = text_field(row, "answer", where), text_field(row, "random_string_to_prepend", where)
    chars = row.get("n_chars")
    return SuiteQuestion(
        suite=MRCR,
        part=f"{row.get('n_needles', '?')} needles",
        id=where,
        messages=_messages(text_field(row, "prompt", where), where),
        max_tokens=_MIN_TOKENS + len(right) // _CHARS_PER_TOKEN,
        wanted=(right,),
        rule=lambda answer: similarity(answer, right, prefix),
        also=size_class(chars, " chars") if isinstance(chars, int) else "",
    )


def similarity(answer: str, right: str, prefix: str) -> float:
    """The similarity of what follows `prefix` in both texts; 0 if the answer does not begin with it."""
    if not answer.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, answer.removeprefix(prefix), right.removeprefix(prefix)).ratio()


def _messages(text: str, where: str) -> tuple[dict[str, str], ...]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, list) or not found or not all(map(_is_message, found)):
        raise ConfigError(f"{KEY}: {where}: `prompt` is not a JSON list of messages of `role` and `content`")
    return tuple({"role": one["role"], "content": one["content"]} for one in found)


def _is_message(one: object) -> bool:
    return isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("role", "content"))
