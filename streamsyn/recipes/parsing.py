"""Parse the answer of an LLM: a document, a section, the headings of an outline, or a question and answer.

Models wrap their text in code fences, labels and headings, each in many forms. Any text is accepted.
Thoughts were removed when the answer was received.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_LABEL = re.compile(
    r"""\A\s*+
    (?:\#{1,6}\s*+|\*{1,2}|_{1,2}|<)?                   # markdown or a tag around it
    (?:(?:here\s+is|here['\u2019]s|below\s+is|this\s+is)\s++)?(?:the\s++)?(?:(?:lost|missing|written)\s++)?
    (?:context|document|background|text)
    (?:\s++document)?
    (?: [^\S\n]*+\n                                     # a line or a colon ends it
    |   \s*+(?::\s*+(?:\*{1,2}|_{1,2})?|(?:\*{1,2}|_{1,2})(?:[^\S\n]*+\n|\s*+:)|>)
    )\s*+""",
    re.IGNORECASE | re.VERBOSE,
)
_FENCE = re.compile(r"\A\s*```[\w-]*[ \t]*\n(?P<inside>.*?)\n?```\s*\Z", re.DOTALL)
_OPEN_FENCE = re.compile(r"\A\s*```[\w-]*[ \t]*\n(?!.*```)", re.DOTALL)
_SECTION_HEADING = re.compile(
    r"""\A\s*
    (?: \#{1,6}[ \t]+[^\n]*
    |   \*\*[^\n*]{1,120}\*\*:?
    |   (?:section|part|chapter)[ ]\d+\b[^\n]{0,120}(?<![.!?,;\s])
    )[ \t]*+(?:\n\s*|\Z)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_DOTS = re.compile(r"\A(?:\.{3}|\u2026)\s*")
_CLOSING_TAG = re.compile(r"</(?:context|document|background|text)>\Z", re.IGNORECASE)
_HEADING_MARK = re.compile(
    r"""\A\s*
    (?:[-*+\u2022>]\s+)?                              # a bullet
    (?:\#{1,6}\s*)?(?:\*{1,2}|_{1,2})?                # a heading, or bold
    (?P<marked>(?:(?:section|part|chapter|heading)\s*)?(?:\d{1,3}|[IVXLC]{1,6}|[A-Z])(?:\.\d+)*\s*[.):\u2013-]\s*)?
    (?:\*{1,2}|_{1,2})?\s*
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WRAPPINGS = 8
"""Maximum number of labels and fences around a document, one in the other."""
_HEADING_CHARS = 120
"""Longest heading; longer lines are prose."""
_QUESTIONS = ("question", "instruction", "query", "q")
_ANSWERS = ("answer", "response", "a")
_SHORT = ("q", "a")
_EMPHASIS = r"(?:\*{1,3}|_{1,3})"
# Spaces are matched possessively, so that lines without a label take linear time.
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
"""A horizontal rule or a blank line."""
_FENCE_LINE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)
_DEPTH = 3
"""Deepest nesting of a pair in JSON: in an object, in a list, below a name."""
_BRACES = 4
"""Number of brackets tried as the start of JSON."""


def document_text(answer: str) -> str:
    """Return the document of an answer, without code fences and labels such as `Context:`."""
    text = answer.strip()
    for _ in range(_WRAPPINGS):
        previous = text
        if fenced := _FENCE.match(text):
            text = fenced["inside"].strip()
        if label := _LABEL.match(text):
            text = text[label.end() :]
        if text.endswith(">"):
            text = _CLOSING_TAG.sub("", text).rstrip()
        if text == previous:
            break
    return _OPEN_FENCE.sub("", text).strip()  # an open fence means that the answer was cut


def section_text(answer: str, title: str, *, goes_on: bool) -> str:
    """Return the text of one section, without a heading, which was not asked for.

    Args:
        answer: The answer of the LLM.
        title: The title of the section; a first line equal to it is removed.
        goes_on: Whether it continues a section that was cut. Some models start such a text with dots.
    """
    text = _SECTION_HEADING.sub("", document_text(answer))
    first, _, rest = text.partition("\n")
    if title and first.strip(" \t*_#:.").casefold() == title.casefold():
        text = rest.lstrip()
    return _DOTS.sub("", text) if goes_on else text


def outline_headings(answer: str, wanted: int) -> list[str]:
    """Return at most `wanted` headings: the numbered lines if there are two or more, else all short lines.

    Small models write poor outlines, so any text is accepted.
    """
    numbered, plain = [], []
    for line in document_text(answer).splitlines():
        mark = _HEADING_MARK.match(line)
        assert mark is not None, "every part of the pattern is optional"
        text = line[mark.end() :].strip(" \t*_#:")
        if not 1 < len(text) <= _HEADING_CHARS:
            continue
        plain.append(text)
        if mark["marked"]:
            numbered.append(text)
    return (numbered if len(numbered) > 1 else plain)[:wanted]


@dataclass(frozen=True, slots=True)
class WrittenPair:
    """A question and its answer, as an LLM wrote them.

    Attributes:
        is_whole: Whether more text followed, so that the answer was not cut.
    """

    question: str
    answer: str
    is_whole: bool


def first_pair(text: str) -> WrittenPair | None:
    """Return the first question that has an answer, or None.

    Recognises labels such as `Question:` in many forms, tags, and JSON.
    """
    plain = document_text(text)
    found = _in_json(plain) if plain.startswith(("{", "[")) else None
    return found or _labelled(plain) or _tagged(plain) or _unlabelled(plain) or _in_json(plain)


def _labelled(text: str) -> WrittenPair | None:
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
            rest = range(place + 2, len(labels))
            after = next((labels[later] for later in rest if _kind(labels[later]) in _QUESTIONS), None)
            asked, answer = question, text[following.end() : after.start() if after else len(text)]
        if asked.strip():
            return WrittenPair(_cleaned(asked), _cleaned(answer), after is not None)
    return None


def _labels(text: str) -> list[re.Match[str]]:
    """Return the labels in `text`, without single letters that are not labels.

    A letter alone on a line is not a label, nor is `A:` if questions are labelled by a word.
    """
    labels = [
        label for label in _PAIR_LABEL.finditer(text) if label["alone"] is None or _kind(label) not in _SHORT
    ]
    first = next((label for label in labels if _kind(label) in _QUESTIONS), None)
    if first is None or _kind(first) in _SHORT:
        return labels
    return [label for label in labels if _kind(label) not in _SHORT]


def _kind(label: re.Match[str]) -> str:
    return label["label"].casefold()


def _tagged(text: str) -> WrittenPair | None:
    tags = list(_TAG.finditer(text))
    kinds = [tag[1].casefold() for tag in tags]
    for place in range(len(tags) - 2):
        if kinds[place : place + 3] == ["question", "/question", "answer"]:
            end = tags[place + 3] if len(tags) > place + 3 else None
            question = text[tags[place].end() : tags[place + 1].start()]
            answer = text[tags[place + 2].end() : end.start() if end else len(text)]
            return WrittenPair(_cleaned(question), _cleaned(answer), end is not None)
    return None


def _unlabelled(text: str) -> WrittenPair | None:
    """A question without a label, with a labelled answer below it."""
    answers = [label for label in _labels(text) if _kind(label) in ("answer", "response")]
    if not answers:
        return None
    above = re.split(r"\n\s*\n", text[: answers[0].start()].strip())[-1]
    asked = _cleaned(re.sub(r"\A[^\n]*:[ \t]*\n", "", above))  # without an introducing line
    if not asked.endswith("?"):
        return None
    if len(answers) == 1:
        return WrittenPair(asked, _cleaned(text[answers[0].end() :]), is_whole=False)
    answer = text[answers[0].end() : answers[1].start()].strip()  # its last line is the next question
    return WrittenPair(asked, _cleaned(re.split(r"\n(?=[^\n]*\Z)", answer)[0]), is_whole=True)


def _in_json(text: str) -> WrittenPair | None:
    decoder = json.JSONDecoder(strict=False)  # models do not escape line breaks
    for begin in [brace.start() for brace in re.finditer(r"[{\[]", text)][:_BRACES]:
        try:
            value, _ = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            continue
        pair = next(_pairs(value, _DEPTH), None)
        if pair is not None:
            return pair
    return None


def _pairs(value: Any, depth: int) -> Iterator[WrittenPair]:
    if isinstance(value, dict):
        named = {str(key).strip().casefold(): below for key, below in value.items()}
        question = next((_plain(named[key]) for key in _QUESTIONS if key in named), None)
        answer = next((_plain(named[key]) for key in _ANSWERS if key in named), None)
        if question is not None and answer is not None:
            yield WrittenPair(question, answer, is_whole=True)
    if isinstance(value, dict | list) and depth:
        for below in value.values() if isinstance(value, dict) else value:
            yield from _pairs(below, depth - 1)


def _plain(value: Any) -> str | None:
    """Return a JSON value as text; a list of strings becomes one answer of several lines. None for others."""
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
    """Strip rules, unmatched fences, unmatched emphasis and quotes around `text`."""
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
