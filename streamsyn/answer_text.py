"""The text of a model's answer, without its thought and up to the end of its turn.

Control tokens such as `<|im_end|>`, spelled out in a text: servers should stop at them and leave them out.
Some do not, and models write a second turn behind them.

Thoughts, which a model writes for itself before its answer: servers with a reasoning parser send them in a
field of their own. Others send them in front of the answer, in one of the forms of `FORMS`. The chat template
of some models writes the opening mark into the prompt: then the answer begins with the thought, and only its
closing mark shows where it ends.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

_ENDS = (
    "<|im_end|>",  # Qwen, SmolLM, InternLM, Kimi
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",
    "<|end_of_text|>",  # Llama 3, Granite
    "<|eot|>",  # Llama 4
    "<|endoftext|>",  # GPT-2, Qwen, GLM
    "<|end|>",  # Phi, gpt-oss
    "<|return|>",  # gpt-oss
    "<|call|>",
    "<|endofturn|>",  # EXAONE
    "[|endofturn|]",
    "<|end_of_turn|>",  # OpenChat
    "<end_of_turn>",  # Gemma 2 and 3
    "<turn|>",  # Gemma 4
    "<|END_OF_TURN_TOKEN|>",  # Command
    "<|END_RESPONSE|>",
    "<｜end▁of▁sentence｜>",  # DeepSeek  # noqa: RUF001
    "<|eos|>",
    "<eos>",
    "[EOS]",
    "<|EOT|>",
    "<|role_end|>",  # Ling
    "<|hy_eos|>",  # Hunyuan
    "<seed:eos>",
)
"""Tokens that end a turn."""
_WEAK_END = "</s>"
"""Ends a turn in Llama 2 and Mistral, and struck-out text in HTML."""
_BEGINS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|header_start|>",
    "<|begin_of_text|>",
    "<|start|>",
    "<start_of_turn>",
    "<|turn>",
    "<|START_OF_TURN_TOKEN|>",
    "<|start_of_role|>",
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "<|startoftext|>",
    "<bos>",
    "<s>",
    "<seed:bos>",
    "[gMASK]",
)
"""Tokens that begin a turn or a text; the role follows."""
_ROLES = (
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<｜User｜>",  # noqa: RUF001
    "<｜Assistant｜>",  # noqa: RUF001
    "[INST]",
)
"""Tokens that begin a turn and name its role."""


def _any_of(tokens: tuple[str, ...], then: str = "") -> str:
    return "|".join(re.escape(token) + then for token in sorted(tokens, key=len, reverse=True))


_ANY = rf"(?:{_any_of((*_ENDS, _WEAK_END, *_BEGINS, *_ROLES))}|<\|\w{{1,40}}\|>)"
_TOKEN = re.compile(_ANY)
_END = re.compile(_any_of(_ENDS))
_ROLE = r"(?:assistant|user|system|model|tool|ipython|developer)\b"
_THEN_ROLE = rf"\s*{_ROLE}"
_LEADING = re.compile(
    rf"\s*(?:{_any_of((*_BEGINS, *_ROLES))})(?:{_ROLE}\s*(?:<\|end_header_id\|>|<\|header_end\|>)?)?\s*"
)
_NEXT_TURN = re.compile(
    rf"{_WEAK_END}\s*(?:{_any_of((*_BEGINS, *_ROLES))})"
    rf"|{_any_of(_BEGINS, _THEN_ROLE)}"  # each by itself: `re` finds the first characters fast
    rf"|{_any_of(_ROLES)}"
)
_TOKEN_HINT = re.compile(r"<[|/\w\uff5c]|\[[A-Z|g]")
"""Every token begins like this; a text without it needs no further search."""
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_APART = frozenset(" \t\"'`()[]{},;:\u2018\u2019\u201c\u201d\u00ab\u00bb")
"""Characters before a mark that the text talks about."""
_REACH = 80
"""Characters looked at for the beginning or end of a line."""


class Fences:
    """The fenced code blocks of a text, in which marks are quoted."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _at(self) -> list[int]:
        return [fence.start() for fence in _FENCE.finditer(self._text)]

    def contains(self, place: int) -> bool:
        """Whether a place is within a block that has an end."""
        before = bisect_right(self._at, place)
        return before % 2 == 1 and before < len(self._at)


def is_mentioned(text: str, start: int, end: int) -> bool:
    """Whether the text talks about the mark `text[start:end]`, as a word of a sentence.

    A mark that begins or ends a line is not mentioned, nor is one that touches the word before it.
    """
    before, after = text[max(0, start - _REACH) : start], text[end : end + _REACH]
    if not before.strip(" \t") or before.rstrip(" \t").endswith("\n"):
        return False
    if not after.strip(" \t") or after.lstrip(" \t").startswith("\n"):
        return False
    return before[-1] in _APART


def first_turn(text: str) -> tuple[str, bool]:
    """Return the text up to the control token that ends it, and whether there was one.

    Control tokens before the text are removed too. Those that the text mentions are kept.
    """
    if not _has_token_hint(text):
        return text, False
    text = text[text_start(text) :]
    fences, ends = Fences(text), list[int]()
    for pattern in (_END, _NEXT_TURN):
        found = (
            mark.start()
            for mark in pattern.finditer(text)
            if not fences.contains(mark.start()) and not is_mentioned(text, *mark.span())
        )
        ends += islice(found, 1)
    end = min(ends, default=len(text))
    for start, stop in reversed([token.span() for token in _TOKEN.finditer(text, 0, end)]):
        if text[stop:end].strip():
            break
        end = start
    return text[:end].rstrip() if end < len(text) else text, end < len(text)


def text_start(text: str) -> int:
    """Return where a text begins, behind control tokens that begin a turn."""
    start = 0
    while lead := _LEADING.match(text, start):
        start = lead.end()
    return start


def has_control_tokens(text: str) -> bool:
    """Whether a control token is spelled out in the text."""
    return _has_token_hint(text) and _TOKEN.search(text) is not None


def _has_token_hint(text: str) -> bool:
    return ("<" in text or "[" in text) and _TOKEN_HINT.search(text) is not None  # "<" is found much faster


@dataclass(frozen=True, slots=True)
class Form:
    """One way to mark a thought.

    Attributes:
        opening: The mark before it.
        closing: The mark after it.
        models: Who writes it.
        needs_opening: Whether the closing mark alone means nothing.
        needs_closing: Whether the opening mark alone means nothing. Without this, a thought that is not
            closed goes on to the end of the answer.
    """

    opening: str
    closing: str
    models: str
    needs_opening: bool = False
    needs_closing: bool = False


FORMS = (
    Form(
        "<think>", "</think>", "DeepSeek, Qwen, GLM, MiniMax, Nemotron, Kimi K2, SmolLM3, Hunyuan, Phi, Ling"
    ),
    Form("<thinking>", "</thinking>", "prompted models, Claude"),
    Form("<thought>", "</thought>", "EXAONE Deep"),
    Form("<reasoning>", "</reasoning>", "prompted models"),
    Form("<seed:think>", "</seed:think>", "Seed-OSS"),
    Form("<mm:think>", "</mm:think>", "MiniMax M3"),
    Form("<ifm|think>", "</ifm|think>", "K2 V3, high effort"),
    Form("<ifm|think_fast>", "</ifm|think_fast>", "K2 V3, medium effort"),
    Form("<ifm|think_faster>", "</ifm|think_faster>", "K2 V3, low effort"),
    Form("<think:opensource>", "</think:opensource>", "Hunyuan 3"),
    Form("[THINK]", "[/THINK]", "Magistral, Mistral Small 4"),
    Form("\u25c1think\u25b7", "\u25c1/think\u25b7", "Kimi-VL, Kimi K1.5"),
    Form("<|begin_of_thought|>", "<|end_of_thought|>", "Sky-T1, OpenThinker"),
    Form("<|START_THINKING|>", "<|END_THINKING|>", "Command A Reasoning"),
    Form("<|inner_prefix|>", "<|inner_suffix|>", "Apertus"),
    Form("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "gpt-oss"),
    Form("<|channel>thought", "<channel|>", "Gemma 4"),
    Form("<|open|>think<|sep|>", "<|close|>think<|sep|>", "Kimi K3"),
    # gpt-oss by a server that removes special tokens and has no parser for it
    Form("analysis", "assistantfinal", "gpt-oss", needs_opening=True, needs_closing=True),
    Form("Here is my thought process:", "Here is my response:", "Granite 3", needs_opening=True),
)
"""The known forms. Upper and lower case do not matter where a mark has brackets."""

_WRAPPERS = (
    ("<answer>", "</answer>"),  # Hunyuan
    ("<response>", "</response>"),  # Granite 4
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
)
"""Marks around the answer itself, behind a thought."""


def _pattern(mark: str) -> str:
    if mark[0].isalpha():
        return re.escape(mark)
    # `re` finds the first character fast if no group is around it.
    return f"{re.escape(mark[0])}(?i:{re.escape(mark[1:])})"


_OPENING = re.compile(
    # A role before it is left from the prompt of a server that removes special tokens.
    r"\s*(?:assistant\s*)?"
    rf"(?:{'|'.join(f'({_pattern(form.opening)})' for form in FORMS)})"
)
_SURE = [form for form in FORMS if not form.needs_opening]
_ANY_OPENING = re.compile("|".join(_pattern(form.opening) for form in _SURE))
_ANY_CLOSING = re.compile("|".join(_pattern(form.closing) for form in _SURE))
_CLOSING = {form: re.compile(_pattern(form.closing)) for form in FORMS}
_SPACE = re.compile(r"\s*")
_MAX_FURTHER = 8
"""Thoughts that are looked for behind the first one."""


def split_thought(answer: str, *, is_open: bool = False) -> tuple[str, str]:
    """Return the thought before an answer with its marks, and the answer; "" for what there is not.

    A closing mark without an opening one ends a thought that began in the prompt, unless the text only
    mentions it (`is_mentioned`) or an opening mark stands somewhere before it.

    Args:
        answer: What the model wrote.
        is_open: Whether the prompt ends with an opening mark: then an answer without a closing one is all
            thought.
    """
    if not _has_mark_hint(answer):
        return (answer, "") if is_open else ("", answer)
    end = _opened_end(answer, text_start(answer))
    if end is None:
        end = _bare_end(answer, is_open=is_open)
    if end is None:
        return (answer, "") if is_open else ("", answer)
    for _ in range(_MAX_FURTHER):
        further = _opened_end(answer, end)
        if further is None:
            break
        end = further
    end = _skip_space(answer, end)
    for opening, closing in _WRAPPERS:
        if answer.startswith(opening, end):
            begin = _skip_space(answer, end + len(opening))
            return answer[:begin], answer[begin:].rstrip().removesuffix(closing)
    return answer[:end], answer[end:]


def without_thought(answer: str) -> str:
    """Return an answer without the thought before it, stripped; "" if the thought was cut."""
    return split_thought(answer)[1].strip()


def thought_tokens(thought: str, text: str, tokens: int) -> int:
    """Estimate the tokens of a thought by its share of the characters; at least one if there is a thought."""
    if not thought:
        return 0
    return min(tokens, max(1, round(tokens * len(thought) / (len(thought) + len(text)))))


def opens_thought(prompt: str) -> Form | None:
    """Return the form whose opening mark a prompt ends with, or None."""
    stripped = prompt.rstrip()
    return next((form for form in FORMS if not form.needs_opening and stripped.endswith(form.opening)), None)


def has_marks(text: str) -> bool:
    """Whether a mark of a thought stands in a text."""
    return _has_mark_hint(text) and bool(_ANY_OPENING.search(text) or _ANY_CLOSING.search(text))


def _has_mark_hint(text: str) -> bool:
    """Whether the text has what each form has; one without it needs no further search."""
    return "<" in text or "[" in text or "\u25c1" in text or "assistantfinal" in text or "Here is my" in text


def _opened_end(answer: str, at: int) -> int | None:
    """Return the end of the thought that begins at a place with its opening mark; None without one."""
    opening = _OPENING.match(answer, at)
    if opening is None:
        return None
    assert opening.lastindex is not None, "one of the forms matches"
    form, begin = FORMS[opening.lastindex - 1], opening.end()
    own = _CLOSING[form]
    closing = own.search(answer, begin)
    if form.needs_closing:
        return closing and closing.end()
    # Some models close a different mark than they opened.
    end = _first_used(own, answer, begin) or _first_used(_ANY_CLOSING, answer, begin)
    return end or (closing.end() if closing else len(answer))


def _bare_end(answer: str, *, is_open: bool) -> int | None:
    """Return the end of a thought that has only a closing mark; None without one."""
    end = _first_used(_ANY_CLOSING, answer, 0)
    if end is None or is_open:
        return end
    begin = _first_used(_ANY_OPENING, answer, 0)
    return end if begin is None or end < begin else None


def _first_used(marks: re.Pattern[str], text: str, at: int) -> int | None:
    """Return the end of the first mark from a place on that the text does not merely mention."""
    used = (mark.end() for mark in marks.finditer(text, at) if not is_mentioned(text, *mark.span()))
    return next(used, None)


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None, "the pattern matches nothing, too"
    return space.end()
