"""Questions from files in LongBench's format (arXiv 2308.14508), with the prompts of our own samples."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from streamsyn.assembly.sample_prompts import FAMILIES, KNOWN_TASKS
from streamsyn.config.command_sections import LongBenchSection
from streamsyn.errors import ConfigError
from streamsyn.scoring.answer_metrics import metric_of
from streamsyn.seeds.forms import NotASeed, answers_in
from streamsyn.templates import PromptTemplate, packaged
from streamsyn.trainer.evaluation.exam import Chat, Question
from streamsyn.trainer.examples import BadRow
from streamsyn.trainer.sources.row_files import FileRows

log = structlog.get_logger()

_MAX_NEW_TOKENS: Final = {
    **dict.fromkeys(("hotpotqa", "2wikimqa", "2wikiqa", "musique"), 32),
    **dict.fromkeys(("gov_report", "govreport", "qmsum", "multi_news", "multinews"), 512),
}
_DEFAULT_MAX_NEW_TOKENS: Final = 128
_SUMMARY: Final = "Write a summary of it, of one page at most."
_PASSAGE: Final = re.compile(r"^Passage \d+:\s*", re.MULTILINE)
_MIN_CONTEXT_TOKENS: Final = 16
_LOGGED: Final = 5
"""Bad rows that are logged one by one; the rest is counted."""


class _Unusable(Exception):
    """Raised when a row cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Item:
    """A row of LongBench.

    Attributes:
        dataset: The name in lower case, without the suffix of LongBench-E.
        id: The row's id, or else its number in the file.
        request: The row's `input`; may be empty for summaries.
        context: The text to read.
        answers: Alternative right answers, at least one.
    """

    dataset: str
    id: str
    request: str
    context: str
    answers: tuple[str, ...]

    @property
    def family(self) -> str:
        """The family of the prompt. Unknown data sets are a question if there is one, otherwise a summary."""
        return KNOWN_TASKS.get(self.dataset, "single_doc_qa" if self.request else "summary")

    @property
    def max_new_tokens(self) -> int:
        """Maximum tokens of the answer."""
        return _MAX_NEW_TOKENS.get(self.dataset, _DEFAULT_MAX_NEW_TOKENS)


def longbench_questions(section: LongBenchSection, chat: Chat, longest: int) -> list[Question]:
    """Make the questions of all files, grouped by data set. Bad rows are counted and logged.

    Args:
        section: `train.longbench`.
        chat: Makes prompts.
        longest: Maximum tokens of a prompt and its answer together.

    Raises:
        ConfigError: No row can be used, or the files cannot be read.
    """
    prompts = _Prompts(chat, section.prompt_tokens, longest)
    found: dict[str, list[Question]] = {}
    bad: Counter[str] = Counter()
    rows = FileRows(section.path, "longbench", "train.longbench.path", count=False).placed()
    for seq, (where, row) in enumerate(rows):
        try:
            if isinstance(row, BadRow):
                raise _Unusable("it is not an object")
            item = item_of(row, seq)
            some = found.setdefault(item.dataset, [])
            if section.samples is None or len(some) < section.samples:
                some.append(prompts.question(item))
        except _Unusable as error:
            bad[str(error)] += 1
            if bad.total() <= _LOGGED:
                log.warning(
                    "longbench.bad_row", at=where, why=row.problem if isinstance(row, BadRow) else str(error)
                )
    questions = [question for name in sorted(found) for question in found[name]]
    if bad:
        log.warning("longbench.bad_rows", count=bad.total(), questions=len(questions))
    if not questions:
        why = "; ".join(f"{reason} ({count})" for reason, count in bad.most_common(3)) or "it is empty"
        raise ConfigError(f"train.longbench.path: {section.path}: no row can be used: {why}")
    unknown = sorted(name for name, some in found.items() if some and name not in KNOWN_TASKS)
    if unknown:
        log.warning(
            "longbench.unknown_datasets", names=unknown, asked="as a question, or for a summary without one"
        )
    return questions


def item_of(row: Mapping[str, Any], number: int) -> Item:
    """Read a row.

    Raises:
        _Unusable: A field is missing or invalid.
    """
    for name in ("input", "context", "dataset"):
        if not isinstance(row.get(name), str):
            raise _Unusable(f"the field `{name}` is missing or not a string")
    if not row["context"].strip():
        raise _Unusable("the context is empty")
    dataset = row["dataset"].strip().lower().removesuffix("_e")
    if not re.fullmatch(r"[\w.-]+", dataset):
        raise _Unusable("the dataset name has characters other than letters, digits, _, - and .")
    if row.get("answers") is None:
        raise _Unusable("the field `answers` is missing")
    try:
        right = tuple(answers_in(row["answers"], "answers"))
    except NotASeed as error:
        raise _Unusable(str(error)) from error
    named = row.get("_id", row.get("id"))
    item_id = str(named) if isinstance(named, str | int) else str(number)
    return Item(dataset, item_id, row["input"].strip(), row["context"], right)


class _Prompts:
    """Renders items, and cuts the middle out of contexts that are too long."""

    def __init__(self, chat: Chat, prompt_tokens: int | None, longest: int) -> None:
        self._chat = chat
        self._prompt_tokens = prompt_tokens
        self._longest = longest
        example = {"contexts": ["a"], "instruction": "i", "task": "t"}
        self._templates = {
            name: PromptTemplate(name, packaged("samples", name), example) for name in FAMILIES
        }

    def question(self, item: Item) -> Question:
        """Make the question of an item.

        Raises:
            _Unusable: The prompt has no room for the context.
        """
        room = self._longest - item.max_new_tokens
        room = room if self._prompt_tokens is None else min(room, self._prompt_tokens)
        text = self._fitting(item, room)
        return Question(
            exam="longbench",
            part=f"longbench_{item.dataset}",
            id=item.id,
            prompt=self._chat.prompt(text, item.max_new_tokens),
            wanted=item.answers,
            grading=metric_of(item.family, item.answers[0]),
            message=text,
        )

    def _fitting(self, item: Item, room: int) -> str:
        text = self._message(item, item.context)
        tokens = self._chat.length(text)
        if tokens <= room:
            return text
        context = self._chat.encode(item.context)
        kept = len(context)
        while tokens > room:
            kept -= tokens - room
            if kept < _MIN_CONTEXT_TOKENS:
                raise _Unusable(f"a prompt of {max(room, 0)} tokens has no room for the context")
            head = kept // 2
            ends = self._chat.decode(context[:head]), self._chat.decode(context[head - kept :])
            text = self._message(item, "".join(ends))
            tokens = self._chat.length(text)
        return text

    def _message(self, item: Item, context: str) -> str:
        contexts = [context]
        if item.family == "multi_doc_qa":  # the template numbers passages itself
            contexts = [part for one in _PASSAGE.split(context) if (part := one.strip())]
        return self._templates[item.family].render(
            contexts=contexts, instruction=item.request or _SUMMARY, task=item.dataset
        )
