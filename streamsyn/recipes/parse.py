"""From what an LLM answered to the document in it."""

import re

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
