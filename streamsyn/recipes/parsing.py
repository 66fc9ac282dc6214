"""From what an LLM answered to the document in it.

From what an LLM answered to the question and the answer in it, in whichever form they come.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_LABEL = re.compile(
    r"""\A\s*
    (?:\#{1,6}\s*|\*{1,2}|_{1,2}|<)?                    # markdown or a tag round it
    (?:(?:here\s+is|here['\u2019]s|below\s+is|this\s+is)\s+)?(?:the\s+)?(?:lost\s+|missing\s+|written\s+)?
    (?:context|document|background|text)
    (?:\s+document)?
    \s*(?::\s*(?:\*{1,2}|_{1,2})?|(?:\*{1,2}|_{1,2})\s*(?::|\n)|>|[ \t]*\n)   # a colon or a line ends it
    \s*""",
    re.IGNORECASE | re.VERBOSE,
)
_FENCE = re.compile(r"\A\s*```[\w-]*[ \t]*\n(?P<inside>.*?)\n?```\s*\Z", re.DOTALL)
_OPEN_FENCE = re.compile(r"\A\s*```[\w-]*[ \t]*\n(?!.*```)", re.DOTALL)
_THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>\s*|\Z)", re.DOTALL)  # left open: there is no document yet
_SECTION_HEADING = re.compile(
    r"""\A\s*
    (?: \#{1,6}[ \t]+[^\n]*
    |   \*\*[^\n*]{1,120}\*\*:?
    |   (?:section|part|chapter)[ ]\d+\b[^\n]{0,120}(?<![.!?,;])
    )[ \t]*(?:\n\s*|\Z)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_DOTS = re.compile(r"\A(?:\.{3}|\u2026)\s*")
_CLOSING_TAG = re.compile(r"</(?:context|document|background|text)>\Z", re.IGNORECASE)


def without_thoughts(answer: str) -> str:
    """What a model said, without what it thought before that; nothing when its thoughts had no end."""
    return _THOUGHTS.sub("", answer).strip()


def document_text(answer: str) -> str:
    """The document, without thoughts, code fences and labels such as `Context:` round it."""
    text = without_thoughts(answer)
    previous = None
    while text != previous:  # a label may stand inside a fence, and a fence below a label
        previous = text
        if fenced := _FENCE.match(text):
            text = fenced["inside"].strip()
        if label := _LABEL.match(text):
            text = text[label.end() :]
        if text.endswith(">"):
            text = _CLOSING_TAG.sub("", text).rstrip()
    return _OPEN_FENCE.sub("", text).strip()  # a fence left open: the answer was cut


def section_text(answer: str, title: str, *, goes_on: bool) -> str:
    """The text of one section, without the heading that was not asked for.

    Args:
        answer: What the LLM gave.
        title: What the section is on.
        goes_on: Whether it goes on in the middle of the section before, where some put dots first.
    """
    text = _SECTION_HEADING.sub("", document_text(answer))
    first, _, rest = text.partition("\n")
    if title and first.strip(" \t*_#:.").casefold() == title.casefold():
        text = rest.lstrip()
    return _DOTS.sub("", text) if goes_on else text


_QUESTIONS = ("question", "instruction", "query", "q")
_ANSWERS = ("answer", "response", "a")
_SHORT = ("q", "a")
_EMPHASIS = r"(?:\*{1,3}|_{1,3})"
# Spaces are taken possessively throughout: what is no label must not cost its length squared.
_PAIR_LABEL = re.compile(
    rf"""^[ \t>]*+(?:[-*+\u2022][ \t]++)?(?:\#{{1,6}}[ \t]*+)?       # a quote, a bullet, a heading
    (?:\(?\d{{1,3}}[.):][ \t]*+)?                                  # a number
    (?P<mark>{_EMPHASIS})?[ \t]*+(?:\d{{1,3}}[.)][ \t]*+)?
    (?:here(?:\ is|'s|\u2019s)[ \t]++)?(?:(?:the|a|my|one)[ \t]++)?  # "Here is a question:"
    (?P<label>question|instruction|query|answer|response|q|a)
    (?P<number>[ \t]*+(?:\#|no\.)?[ \t]*+\(?\d{{1,3}}\)?)?
    (?: [ \t]*+{_EMPHASIS}?[ \t]*+[:\uff1a](?(mark)(?:[ \t]*+{_EMPHASIS})?)  # a colon ends it,
    |   (?(number)[.)](?=[ \t])|(?!))                              # or what stands behind its number,
    |   (?P<alone>[ \t]*+{_EMPHASIS}?[ \t]*+$)                      # or the line
    )""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_INLINE = re.compile(
    rf"\s{_EMPHASIS}?(?P<label>answer|a)[ \t]*+{_EMPHASIS}?[:\uff1a][ \t]*+{_EMPHASIS}?", re.IGNORECASE
)
_TAG = re.compile(r"<(/?(?:question|answer))>", re.IGNORECASE)
_RULE = re.compile(r"(?:-{3,}|\*{3,}|={3,}|_{3,})?\Z")
"""A line that is one, or blank."""
_FENCE_LINE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)
_DEPTH = 3
"""A pair stands in an object, that in a list, that below one more name: no deeper."""
_BRACES = 4
"""So many places are tried where JSON may begin."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer; `is_whole` says that the text went on behind them."""

    question: str
    answer: str
    is_whole: bool


def first_pair(text: str) -> Pair | None:
    """The first question with an answer in what an LLM gave; None where there is none.

    Understood are labels such as `Question:` in their many forms, tags, and JSON.
    """
    plain = document_text(text.rpartition("</think>")[2])
    found = _in_json(plain) if plain.startswith(("{", "[")) else None
    return found or _labelled(plain) or _tagged(plain) or _unlabelled(plain) or _in_json(plain)


def _labelled(text: str) -> Pair | None:
    labels = _labels(text)
    ends = [*labels, None]
    for place, (label, following) in enumerate(pairwise(ends)):
        if label is None or _kind(label) not in _QUESTIONS:
            continue
        question = text[label.end() : following.start() if following else len(text)]
        if following is None or _kind(following) in _QUESTIONS:
            short = _kind(label) in _SHORT
            inline = next(
                (one for one in _INLINE.finditer(question) if short or _kind(one) not in _SHORT), None
            )
            if inline is None:
                continue
            asked, answer, after = question[: inline.start()], question[inline.end() :], following
        else:
            after = next((one for one in labels[place + 2 :] if _kind(one) in _QUESTIONS), None)
            asked, answer = question, text[following.end() : after.start() if after else len(text)]
        if asked.strip():
            return Pair(_cleaned(asked), _cleaned(answer), after is not None)
    return None


def _labels(text: str) -> list[re.Match[str]]:
    """The labels in it. One letter alone on a line is none; nor is `A:` where questions are called so."""
    labels = [
        label for label in _PAIR_LABEL.finditer(text) if label["alone"] is None or _kind(label) not in _SHORT
    ]
    first = next((label for label in labels if _kind(label) in _QUESTIONS), None)
    if first is None or _kind(first) in _SHORT:
        return labels
    return [label for label in labels if _kind(label) not in _SHORT]


def _kind(label: re.Match[str]) -> str:
    return label["label"].casefold()


def _tagged(text: str) -> Pair | None:
    tags = list(_TAG.finditer(text))
    kinds = [tag[1].casefold() for tag in tags]
    for place in range(len(tags) - 2):
        if kinds[place : place + 3] == ["question", "/question", "answer"]:
            end = tags[place + 3] if len(tags) > place + 3 else None
            question = text[tags[place].end() : tags[place + 1].start()]
            answer = text[tags[place + 2].end() : end.start() if end else len(text)]
            return Pair(_cleaned(question), _cleaned(answer), end is not None)
    return None


def _unlabelled(text: str) -> Pair | None:
    """A question without a label, with a labelled answer below it."""
    answers = [label for label in _labels(text) if _kind(label) in ("answer", "response")]
    if not answers:
        return None
    above = re.split(r"\n\s*\n", text[: answers[0].start()].strip())[-1]
    asked = _cleaned(re.sub(r"\A[^\n]*:[ \t]*\n", "", above))  # not what introduces it
    if not asked.endswith("?"):
        return None
    if len(answers) == 1:
        return Pair(asked, _cleaned(text[answers[0].end() :]), is_whole=False)
    answer = text[answers[0].end() : answers[1].start()].strip()  # it ends with the next question
    return Pair(asked, _cleaned(re.split(r"\n(?=[^\n]*\Z)", answer)[0]), is_whole=True)


def _in_json(text: str) -> Pair | None:
    decoder = json.JSONDecoder(strict=False)  # models leave line breaks as they are
    for begin in [brace.start() for brace in re.finditer(r"[{\[]", text)][:_BRACES]:
        try:
            value, _ = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            continue
        pair = next(_pairs(value, _DEPTH), None)
        if pair is not None:
            return pair
    return None


def _pairs(value: Any, depth: int) -> Iterator[Pair]:
    if isinstance(value, dict):
        named = {str(key).strip().casefold(): below for key, below in value.items()}
        question = next((_plain(named[key]) for key in _QUESTIONS if key in named), None)
        answer = next((_plain(named[key]) for key in _ANSWERS if key in named), None)
        if question is not None and answer is not None:
            yield Pair(question, answer, is_whole=True)
    if isinstance(value, dict | list) and depth:
        for below in value.values() if isinstance(value, dict) else value:
            yield from _pairs(below, depth - 1)


def _plain(value: Any) -> str | None:
    """A value as text; a list is several answers in one."""
    match value:
        case str():
            return value.strip()
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return str(value)
        case list() if value and all(isinstance(part, str) for part in value):
            return "\n".join(value)
        case _:
            return None


def _cleaned(text: str) -> str:
    """Without rules and fences that belong to what stands round it, and emphasis that is only half there."""
    lines = text.strip().split("\n")
    while lines and _RULE.match(lines[-1].strip()):
        lines.pop()
    text = "\n".join(lines).strip()
    if len(fences := list(_FENCE_LINE.finditer(text))) % 2:
        text = text[: fences[-1].start()].rstrip()
    for mark in ("**", "__"):
        if text.count(mark) == 1:
            text = text.removeprefix(mark).removesuffix(mark).strip()
        if text.count(mark) == 2 and text.startswith(mark) and text.endswith(mark):
            text = text[2:-2].strip()
    if len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text
