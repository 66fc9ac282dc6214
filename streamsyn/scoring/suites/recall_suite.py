"""Questions of the recall tasks of HELMET (Yen et al., arXiv 2410.02694), from the files that it publishes.

    json_kv         the value of a key in a large JSON object: rows with `context`, `question`, `answer` and
                    `demos`, pairs of which two are shown first
    niah_...        needles of RULER in HELMET's form: rows with `context`, `query`, `type_needle_v` and
                    `outputs` or `answer`; the task is the name of the file or of its folder

Scores follow the published code (github.com/princeton-nlp/HELMET, `data.py`, `utils.py`): for `json_kv`
whether the answer holds the value, both normalised as SQuAD's are; for needles the share of the values in the
answer. The published code also looks at what follows `Corresponding value:` alone, which changes no score
because it is a part of the answer. Prompts are our own, unless given: HELMET's are parts of its code.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.longbench_metrics import normalized_words
from streamsyn.scoring.suites.ruler_suite import NIAH_TASKS
from streamsyn.scoring.suites.suite_question import (
    KEY,
    SuiteQuestion,
    as_user,
    filled,
    names_in,
    text_field,
    texts_field,
)

RECALL: Final = "helmet_recall"
JSON_KV: Final = "json_kv"
_SHOTS: Final = 2
_TOKENS: Final = {JSON_KV: 100, "niah_multikey_3": 100, "niah_multiquery": 100}
"""Published maximum tokens of an answer; 50 for the other tasks."""
_JSON_KV: Final = (
    "{context}\n\nThe text above is a JSON object. Find the value of a key in it, and write that value and "
    "nothing else.\n\n{demos}Key: {question}\nCorresponding value:"
)
_DEMO: Final = "Key: {}\nCorresponding value: {}\n\n"
_NEEDLES: Final = (
    "Special magic {type_needle_v} are hidden in the text below. Remember them: you will be asked about "
    "them.\n\n{context}\n\nWhich special magic {type_needle_v} does the text give for {query}? Write them "
    "all, and nothing else."
)


def recall_question(
    row: Mapping[str, Any], where: str, templates: Mapping[str, str], prompt_chars: int | None
) -> SuiteQuestion:
    """The question of a row of `json_kv`, or of a needle task.

    Raises:
        ConfigError: A field is wrong, or the task is not known.
    """
    text_field(row, "context", where)
    if "type_needle_v" in row:
        task = next((name for name in names_in(where) if name in NIAH_TASKS), None)
        if task is None:
            raise ConfigError(
                f"{KEY}: {where} is of no needle task: the file or its folder must have the name of one: "
                f"{', '.join(NIAH_TASKS)}"
            )
        text_field(row, "query", where)
        wanted = texts_field(row, "answer" if "answer" in row else "outputs", where)
        rule, template, fields = partial(_share, wanted=wanted), _NEEDLES, dict(row)
    else:
        task, wanted = JSON_KV, [text_field(row, "answer", where)]
        text_field(row, "question", where)
        rule, template = partial(_holds, wanted=wanted), _JSON_KV
        fields = {**row, "demos": "".join(_DEMO.format(*pair) for pair in _demos(row, where))}
    return SuiteQuestion(
        suite=RECALL,
        part=task,
        id=where,
        messages=as_user(filled(templates.get(task, template), fields, prompt_chars)),
        max_tokens=_TOKENS.get(task, 50),
        wanted=tuple(wanted),
        rule=rule,
    )


def _demos(row: Mapping[str, Any], where: str) -> list[list[str]]:
    found: Any = row.get("demos") or []
    is_list = isinstance(found, list)
    if not is_list or not all(isinstance(one, list) and len(one) == 2 for one in found):
        raise ConfigError(f"{KEY}: {where}: `demos` is not a list of pairs of a key and its value")
    pairs: list[list[str]] = found[:_SHOTS]
    return pairs


def _holds(answer: str, wanted: list[str]) -> float:
    text = " ".join(normalized_words(answer))
    return float(any(" ".join(normalized_words(one)) in text for one in wanted))


def _share(answer: str, wanted: list[str]) -> float:
    return sum(one.lower() in answer.lower() for one in wanted) / len(wanted)
