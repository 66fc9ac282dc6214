"""Questions of published suites, read from their own files: LongBench versions 1 and 2. No data is packaged.

A row of version 1 has `input`, `context`, `answers` and `dataset` (arXiv 2308.14508); a row of version 2 has
`question`, `context`, `choice_A` to `choice_D`, `answer`, `difficulty` and `length` (arXiv 2412.15204).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from streamsyn.errors import ConfigError
from streamsyn.io.inputs import decode_all, find_rows
from streamsyn.io.rows import ReadOptions
from streamsyn.scoring.longbench_metrics import METRICS, check_metric, longbench_score

KEY: Final = "--suite"
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


@dataclass(frozen=True, slots=True)
class SuiteQuestion:
    """A question of a suite.

    Attributes:
        suite: `longbench` or `longbench_v2`.
        part: The data set of version 1; the length of version 2.
        also: The other part that it counts in: the difficulty of version 2.
        id: The row's `_id`, or else its place.
        prompt: The user message.
        max_tokens: Maximum tokens of the answer.
        wanted: Alternative right answers.
        classes: All classes, for data sets that are classified.
    """

    suite: str
    part: str
    also: str
    id: str
    prompt: str
    max_tokens: int
    wanted: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def score(self, answer: str) -> float:
        """The score of an answer, from 0 to 1, by the suite's published rules."""
        if self.suite == V2:
            return float(chosen(answer) == self.wanted[0])
        return longbench_score(self.part, answer, self.wanted, self.classes)


def chosen(answer: str) -> str | None:
    """The letter that an answer chooses, by LongBench v2's published rule; None if there is none."""
    plain = answer.replace("*", "")
    found = next((match for pattern in _V2_ANSWERS if (match := re.search(pattern, plain))), None)
    return found[1] if found else None


def read_suites(
    paths: Sequence[str],
    prompts: Path | None = None,
    prompt_chars: int | None = None,
    limit: int | None = None,
) -> Iterator[SuiteQuestion]:
    """Read the questions of files, directories or globs, in their order.

    Args:
        paths: JSON lines, JSON, Parquet or a saved data set.
        prompts: A JSON file with a prompt for each data set of version 1, as LongBench publishes it.
        prompt_chars: Contexts are cut in the middle so that prompts have at most so many characters.
        limit: Maximum number of questions of a part.

    Raises:
        ConfigError: A file cannot be read, or a row is not of a known format.
    """
    templates = {**_PROMPTS, **(_prompts_in(prompts) if prompts is not None else {})}
    counts: dict[tuple[str, str], int] = {}
    for path in paths:
        for place in find_rows(path, KEY).places:
            for where, row in decode_all(place, ReadOptions(key=KEY)):
                made = _question(row, where, templates, prompt_chars)
                part = made.suite, made.part
                counts[part] = counts.get(part, 0) + 1
                if limit is None or counts[part] <= limit:
                    yield made


def _prompts_in(path: Path) -> dict[str, str]:
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ConfigError(f"--prompts: {path} is not a JSON object of a prompt for each data set")
    return found


def _question(
    row: object, where: str, templates: Mapping[str, str], prompt_chars: int | None
) -> SuiteQuestion:
    if not isinstance(row, dict) or not isinstance(row.get("context"), str):
        raise ConfigError(f"{KEY}: {where} is not a question of LongBench: it has no `context`")
    row_id = str(row.get("_id", where))
    if "choice_A" in row:
        fields = [_text(row, name, where) for name in ("question", "answer", "length", "difficulty")]
        for letter in _CHOICES:
            _text(row, f"choice_{letter}", where)
        _, right, length, difficulty = fields
        if right not in _CHOICES:
            raise ConfigError(f"{KEY}: {where}: `answer` is {right!r}, and must be A, B, C or D")
        text = _filled(_V2_PROMPT, row, prompt_chars)
        return SuiteQuestion(V2, length, difficulty, row_id, text, _V2_TOKENS, (right,))
    dataset = _text(row, "dataset", where).lower().removesuffix("_e")
    if dataset not in METRICS:
        raise ConfigError(f"{KEY}: {where}: {dataset!r} is not a data set of LongBench: {', '.join(METRICS)}")
    check_metric(dataset)
    _text(row, "input", where)
    answers, classes = row.get("answers"), row.get("all_classes") or ()
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise ConfigError(f"{KEY}: {where}: `answers` is not a list of texts")
    text = _filled(templates.get(dataset, _SHORT), row, prompt_chars)
    tokens = _MAX_TOKENS.get(dataset, 32)
    return SuiteQuestion(V1, dataset, "", row_id, text, tokens, tuple(answers), tuple(map(str, classes)))


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{KEY}: {where}: `{name}` is missing or not a text")
    return value


def _filled(template: str, row: dict[str, Any], prompt_chars: int | None) -> str:
    """The template with the fields of a row; what stands in braces in a field stays as it is."""
    context = row["context"]

    def fill(context: str) -> str:
        values = {**row, "context": context}
        return re.sub(r"\{(\w+)\}", lambda field: str(values.get(field[1], field[0])), template)

    text = fill(context)
    if prompt_chars is None or len(text) <= prompt_chars:
        return text
    kept = max(0, len(context) - (len(text) - prompt_chars))
    return fill(context[: kept - kept // 2] + context[len(context) - kept // 2 :])
