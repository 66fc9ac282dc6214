"""Questions of RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks, from the files that it generates.

A row has `input`, `outputs` and, in newer versions, `answer_prefix`, with which the answer is to begin. The
task is the name of the file or of its folder, as RULER writes them (`niah_single_1/validation.jsonl`). Files
have to be prepared without a chat template (`--model_template_type base`): the server adds its own.

Tokens of answers, the cleaning of answers and scores follow the published code (github.com/NVIDIA/RULER,
`scripts/data/synthetic/constants.py`, `scripts/eval`).
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.suite_question import (
    KEY,
    SuiteQuestion,
    as_user,
    names_in,
    size_class,
    text_field,
    texts_field,
)

RULER: Final = "ruler"
NIAH_TASKS: Final = (
    *(f"niah_single_{n}" for n in (1, 2, 3)),
    *(f"niah_multikey_{n}" for n in (1, 2, 3)),
    "niah_multivalue",
    "niah_multiquery",
)
_TOKENS: Final = {**dict.fromkeys(NIAH_TASKS, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
"""The tasks, each with the published number of tokens to generate."""
_ANY_IS_ENOUGH: Final = frozenset({"qa_1", "qa_2"})
_CONTROL: Final = re.compile(r"[\x00-\x1f]")


def ruler_question(row: Mapping[str, Any], where: str) -> SuiteQuestion:
    """The question of a row, which counts by its task and by its length.

    Raises:
        ConfigError: A field is wrong, or the task is not known.
    """
    named = [str(row["task"])] if "task" in row else names_in(where)
    task = next((name for name in named if name in _TOKENS), None)
    if task is None:
        raise ConfigError(
            f"{KEY}: {where} is of no task of RULER: the file or its folder must have the name of one: "
            f"{', '.join(_TOKENS)}"
        )
    wanted = texts_field(row, "outputs", where)
    length = row.get("length")
    rule = string_match_part if task in _ANY_IS_ENOUGH else string_match_all
    return SuiteQuestion(
        suite=RULER,
        part=task,
        id=where,
        messages=as_user(text_field(row, "input", where) + str(row.get("answer_prefix") or "")),
        max_tokens=_TOKENS[task],
        wanted=tuple(wanted),
        rule=partial(rule, wanted=wanted),
        also=size_class(length) if isinstance(length, int) else "",
    )


def string_match_all(answer: str, wanted: Sequence[str]) -> float:
    """The share of the texts `wanted` that occur in the answer, ignoring case."""
    text = _cleaned(answer)
    return sum(one.lower() in text for one in wanted) / len(wanted)


def string_match_part(answer: str, wanted: Sequence[str]) -> float:
    """1 if one of the texts `wanted` occurs in the answer, ignoring case; otherwise 0."""
    text = _cleaned(answer)
    return float(any(one.lower() in text for one in wanted))


def _cleaned(answer: str) -> str:
    return _CONTROL.sub("\n", answer.strip()).strip().lower()
