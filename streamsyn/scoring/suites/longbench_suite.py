"""Questions of LongBench, versions 1 and 2.

A row of version 1 has `input`, `context`, `answers` and `dataset` (arXiv 2308.14508); a row of version 2 has
`question`, `context`, `choice_A` to `choice_D`, `answer`, `difficulty` and `length` (arXiv 2412.15204).
Scores follow the published code (github.com/THUDM/LongBench); prompts are our own unless the published ones
are given.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.longbench_metrics import METRICS, check_metric, longbench_score
from streamsyn.scoring.suites.suite_question import (
    KEY,
    SuiteQuestion,
    as_user,
    filled,
    text_field,
    texts_field,
)

V1, V2 = "longbench", "longbench_v2"
_CHOICES: Final = "ABCD"
_V2_TOKENS: Final = 128
_MAX_TOKENS: Final = {
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"), 64),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
}
"""Published maximum tokens of an answer; 32 for the other data sets."""
_SHORT: Final = (
    "{context}\n\nThe text above answers this question. Write the answer as short as you can, and nothing "
    "else.\n\nQuestion: {input}\nAnswer:"
)
_SHORT_ZH: Final = "{context}\n\n请根据以上文字回答问题，只写答案，尽可能简短。\n\n问题：{input}\n回答："  # noqa: RUF001
_SUMMARY: Final = "{context}\n\nWrite a summary of the text above, of one page at most. {input}\n\nSummary:"
_CONTINUE: Final = "{context}\n\n{input}"
_PROMPTS: Final = {
    **dict.fromkeys(("gov_report", "multi_news", "qmsum"), _SUMMARY),
    "vcsum": "{context}\n\n请用不超过一页的文字总结以上会议记录。{input}\n\n总结：",  # noqa: RUF001
    **dict.fromkeys(("multifieldqa_zh", "dureader"), _SHORT_ZH),
    **dict.fromkeys(("trec", "triviaqa", "samsum", "lsht"), _CONTINUE),
    "passage_count": (
        "{context}\n\nSome of the paragraphs above are repeated. How many different ones are there? Write "
        "the number and nothing else. {input}\n\nNumber:"
    ),
    "passage_retrieval_en": (
        "{context}\n\nWhich of the paragraphs above is this a summary of? Answer with its name, such as "
        "Paragraph 1, and nothing else.\n\n{input}\n\nAnswer:"
    ),
    "passage_retrieval_zh": (
        "{context}\n\n以下是上面哪个段落的摘要？只写段落编号，例如：段落1。\n\n{input}\n\n答案："  # noqa: RUF001
    ),
    **dict.fromkeys(
        ("lcc", "repobench-p"), "Write the next line of this code.\n{context}{input}Next line:\n"
    ),
}
_V2_PROMPT: Final = (
    "{context}\n\nThe text above answers this question: {question}\n(A) {choice_A}\n(B) {choice_B}\n"
    '(C) {choice_C}\n(D) {choice_D}\n\nAnswer in the form: "The correct answer is (A)".'
)
_V2_ANSWERS: Final = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")
"""As published, tried one after the other."""


def longbench_v1(
    row: Mapping[str, Any], where: str, templates: Mapping[str, str], prompt_chars: int | None
) -> SuiteQuestion:
    """The question of a row of version 1.

    Raises:
        ConfigError: A field is wrong, or the package for the metric is missing.
    """
    dataset = text_field(row, "dataset", where).lower().removesuffix("_e")
    if dataset not in METRICS:
        raise ConfigError(f"{KEY}: {where}: {dataset!r} is not a data set of LongBench: {', '.join(METRICS)}")
    check_metric(dataset)
    for name in ("input", "context"):
        text_field(row, name, where)
    answers, classes = texts_field(row, "answers", where), tuple(map(str, row.get("all_classes") or ()))
    template = templates.get(dataset) or _PROMPTS.get(dataset, _SHORT)
    return SuiteQuestion(
        suite=V1,
        part=dataset,
        id=str(row.get("_id", where)),
        messages=as_user(filled(template, row, prompt_chars)),
        max_tokens=_MAX_TOKENS.get(dataset, 32),
        wanted=tuple(answers),
        rule=partial(longbench_score, dataset, wanted=answers, classes=classes),
    )


def longbench_v2(row: Mapping[str, Any], where: str, prompt_chars: int | None) -> SuiteQuestion:
    """The question of a row of version 2, which counts by its length and by its difficulty.

    Raises:
        ConfigError: A field is wrong.
    """
    for name in ("question", "context", *(f"choice_{letter}" for letter in _CHOICES)):
        text_field(row, name, where)
    right = text_field(row, "answer", where)
    if right not in _CHOICES:
        raise ConfigError(f"{KEY}: {where}: `answer` is {right!r}, and must be A, B, C or D")
    return SuiteQuestion(
        suite=V2,
        part=text_field(row, "length", where),
        id=str(row.get("_id", where)),
        messages=as_user(filled(_V2_PROMPT, row, prompt_chars)),
        max_tokens=_V2_TOKENS,
        wanted=(right,),
        rule=lambda answer: float(chosen(answer) == right),
        also=text_field(row, "difficulty", where),
    )


def chosen(answer: str) -> str | None:
    """The letter that an answer chooses, by LongBench v2's published rule; None if there is none."""
    plain = answer.replace("*", "")
    found = next((match for pattern in _V2_ANSWERS if (match := re.search(pattern, plain))), None)
    return found[1] if found else None
