from dataclasses import dataclass, field
from typing import Any, Final

from streamsyn.sglang.simulator.asks import Ask
from streamsyn.sglang.simulator.cache import CHARACTERS_A_TOKEN, count_tokens
from streamsyn.sglang.simulator.faults import Fault
from streamsyn.sglang.simulator.reading import found, told
from streamsyn.sglang.simulator.text import Prose

EOS_ID: Final = 2
PAIR_FORM: Final = "Question: ...\nAnswer: ..."
"""A question that holds this is answered in this form."""
REFUSAL: Final = "I'm sorry, but I can't help with writing this document."

Finish = dict[str, Any]
"""A finish reason as `meta_info` has it; the chat route shows its `type` and `matched`."""

STOPPED: Final[Finish] = {"type": "stop", "matched": EOS_ID}
ABORTED: Final[Finish] = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
ABORTED_WAITING: Final[Finish] = {"type": "abort", "message": "Abort in waiting queue"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an ask."""

    text: str
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    retractions: int = 0
    """How often it was thrown out of the running batch."""
    weights: list[dict[str, Any]] = field(default_factory=list)
    """Which weights wrote it: `version`, and `start` and `end` in its tokens."""

    @property
    def aborted(self) -> bool:
        """Whether it ended before its end."""
        return bool(self.finish["type"] == "abort")

    @property
    def weight_version(self) -> str:
        """Of the weights that wrote its end."""
        return str(self.weights[-1]["version"])


def cut_short(tokens: int) -> Finish:
    """The end of an answer for whose other tokens there was no room."""
    return {"type": "length", "length": tokens}


def compose(ask: Ask, fault: Fault | None, prose: Prose, words: int) -> tuple[str, Finish]:
    """What is to be written, and how it ends."""
    if ask.max_tokens == 0:
        return "", cut_short(0)
    text = _content(ask, fault, prose, words)
    tokens = count_tokens(text)
    if ask.max_tokens is not None and tokens > ask.max_tokens:
        return text[: ask.max_tokens * CHARACTERS_A_TOKEN], cut_short(ask.max_tokens)
    if fault is Fault.TRUNCATED:
        return text, cut_short(tokens)
    return text, ABORTED if fault is Fault.ABORTED else STOPPED


def _content(ask: Ask, fault: Fault | None, prose: Prose, words: int) -> str:
    match fault:
        case Fault.EMPTY:
            return ""
        case Fault.SHORT:
            return prose.write(min(words, 6))
        case Fault.REFUSAL:
            return REFUSAL
        case Fault.REPETITION:
            sentence = prose.write(16)
            return " ".join([sentence] * max(8, words // 16))
        case Fault.ECHO:
            return ask.question
        case Fault.QA:
            last = ask.question.rstrip().rpartition("\n")[2]
            return f"{prose.write(words)}\n\nQuestion: {ask.question}\nAnswer: {last}"
        case Fault.TRUNCATED | Fault.ABORTED:
            text = prose.write(words)
            return text[: len(text) * 3 // 5]
        case _ if PAIR_FORM in ask.question:
            return prose.pair()
        case _:
            return (found(ask.question) if ask.is_exam else "") or prose.about(told(ask.question), words)
