"""Questions about long contexts in LongBench's format (arXiv 2308.14508), asked in our own words."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from streamsyn.assembly.sample_prompts import FAMILIES, KNOWN_TASKS
from streamsyn.config.train_section import LongBenchSection
from streamsyn.errors import ConfigError
from streamsyn.scoring.answer_metrics import metric_of
from streamsyn.templates import PromptTemplate, packaged
from streamsyn.trainer.evaluation.answering import Chat
from streamsyn.trainer.evaluation.exam import Question
from streamsyn.trainer.sources.row_files import FileRows

log = structlog.get_logger()

_MAX_NEW_TOKENS: Final = {
    **dict.fromkeys(("hotpotqa", "2wikimqa", "2wikiqa", "musique"), 32),
    **dict.fromkeys(("gov_report", "govreport", "qmsum", "multi_news", "multinews"), 512),
}
_OTHERS_MAX_NEW_TOKENS: Final = 128
_SUMMARY: Final = "Write a summary of it, of one page at most."
_PASSAGE: Final = re.compile(r"^Passage \d+:\s*", re.MULTILINE)
_MIN_CONTEXT_TOKENS: Final = 16
_SHOWN: Final = 5
"""Bad rows that are logged one by one."""


class _BadRow(Exception):
    """Raised when a row is no question; its text says why."""


@dataclass(frozen=True, slots=True)
class Item:
    """A row of LongBench.

    Attributes:
        dataset: Its name in small letters, without the ending of LongBench-E.
        id: What the file calls it, or its number there.
        request: The row's `input`; may be empty where a summary is asked for.
        context: What is to be read.
        answers: Right answers, one at least.
    """

    dataset: str
    id: str
    request: str
    context: str
    answers: tuple[str, ...]

    @property
    def family(self) -> str:
        """How it is asked. A data set that is not known: a question if there is one, else for a summary."""
        return KNOWN_TASKS.get(self.dataset, "single_doc_qa" if self.request else "summary")

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""
        return _MAX_NEW_TOKENS.get(self.dataset, _OTHERS_MAX_NEW_TOKENS)


def longbench_questions(section: LongBenchSection, chat: Chat, longest: int) -> list[Question]:
    """The questions of all files, data set by data set. A row that makes none is counted and said.

    Args:
        section: `train.longbench`.
        chat: Makes prompts.
        longest: Tokens of a prompt with its answer at most.

    Raises:
        ConfigError: There is no row that makes a question, or nothing to read.
    """
    asking = _Asking(chat, section.prompt_tokens, longest)
    found: dict[str, list[Question]] = {}
    bad: Counter[str] = Counter()
    for where, row in FileRows(section.path, "longbench", "train.longbench.path", count=False).placed():
        try:
            if row.value is None:
                raise _BadRow("it is no row")
            item = item_of(row.value, row.seq)
            some = found.setdefault(item.dataset, [])
            if section.samples is None or len(some) < section.samples:
                some.append(asking.question(item))
        except _BadRow as error:
            bad[str(error)] += 1
            if bad.total() <= _SHOWN:
                log.warning("longbench.bad_row", at=where, why=row.problem or str(error))
    questions = [question for name in sorted(found) for question in found[name]]
    if bad:
        log.warning("longbench.bad_rows", count=bad.total(), questions=len(questions))
    if not questions:
        why = "; ".join(f"{reason} ({count})" for reason, count in bad.most_common(3)) or "it is empty"
        raise ConfigError(f"train.longbench.path: {section.path}: no row of it is a question: {why}")
    unknown = sorted(name for name, some in found.items() if some and name not in KNOWN_TASKS)
    if unknown:
        log.warning("longbench.unknown_datasets", names=unknown, asked="as a question, or for a summary")
    return questions


def item_of(row: Mapping[str, Any], number: int) -> Item:
    """What a row says.

    Raises:
        _BadRow: Something is missing.
    """
    for name in ("input", "context", "dataset"):
        if not isinstance(row.get(name), str):
            raise _BadRow(f"there is no text `{name}`")
    if not row["context"].strip():
        raise _BadRow("its context is empty")
    dataset = row["dataset"].strip().lower().removesuffix("_e")
    if not re.fullmatch(r"[\w.-]+", dataset):
        raise _BadRow("its dataset has no plain name")
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise _BadRow("there is no list `answers` of texts")
    right = tuple(one for one in answers if one.strip())
    if not right:
        raise _BadRow("it has no answer")
    named = row.get("_id", row.get("id"))
    shown = str(named) if isinstance(named, str | int) else str(number)
    return Item(dataset, shown, row["input"].strip(), row["context"], right)


class _Asking:
    """Puts items into words, and cuts the middle out of contexts that are too long."""

    def __init__(self, chat: Chat, prompt_tokens: int | None, longest: int) -> None:
        self._chat = chat
        self._prompt_tokens = prompt_tokens
        self._longest = longest
        example = {"contexts": ["a"], "instruction": "i", "task": "t"}
        self._templates = {
            name: PromptTemplate(name, packaged("samples", name), example) for name in FAMILIES
        }

    def question(self, item: Item) -> Question:
        """The question that an item asks.

        Raises:
            _BadRow: Its question alone is too long.
        """
        room = self._longest - item.max_new_tokens
        room = room if self._prompt_tokens is None else min(room, self._prompt_tokens)
        return Question(
            exam="longbench",
            part=f"longbench_{item.dataset}",
            id=item.id,
            prompt=self._chat.prompt(self._fitting(item, room), item.max_new_tokens),
            wanted=item.answers,
            grading=metric_of(item.family, item.answers[0]),
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
                raise _BadRow(f"a prompt of {max(room, 0)} tokens has no room for its context")
            head = kept // 2
            ends = self._chat.decode(context[:head]), self._chat.decode(context[head - kept :])
            text = self._message(item, "".join(ends))
            tokens = self._chat.length(text)
        return text

    def _message(self, item: Item, context: str) -> str:
        contexts = [context]
        if item.family == "multi_doc_qa":  # the template counts passages by itself
            contexts = [part for one in _PASSAGE.split(context) if (part := one.strip())]
        return self._templates[item.family].render(
            contexts=contexts, instruction=item.request or _SUMMARY, task=item.dataset
        )
