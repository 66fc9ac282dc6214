"""From an answer that should be an outline to headings, whatever it is: small models write poor outlines."""

import re
from collections.abc import Sequence

from streamsyn.recipes.parse import document_text

_MARK = re.compile(
    r"""\A\s*
    (?:[-*+\u2022>]\s+)?                              # a bullet
    (?:\#{1,6}\s*)?(?:\*{1,2}|_{1,2})?                # a heading, or bold
    (?P<marked>(?:(?:section|part|chapter|heading)\s*)?(?:\d{1,3}|[IVXLC]{1,6}|[A-Z])(?:\.\d+)*\s*[.):\u2013-]\s*)?
    (?:\*{1,2}|_{1,2})?\s*
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LONGEST = 120
"""Characters of a heading at most; what is longer is prose."""


def headings(answer: str, wanted: int) -> list[str]:
    """At most `wanted` headings: the numbered lines where there are two or more, else all short lines."""
    numbered, plain = [], []
    for line in document_text(answer).splitlines():
        mark = _MARK.match(line)
        assert mark is not None, "all of it is optional"
        text = line[mark.end() :].strip(" \t*_#:")
        if not 1 < len(text) <= _LONGEST:
            continue
        plain.append(text)
        if mark["marked"]:
            numbered.append(text)
    return (numbered if len(numbered) > 1 else plain)[:wanted]


def title(found: Sequence[str], begins: float, ends: float) -> str:
    """What the part of a document between two shares of its length is on; "" where nothing says."""
    if not found:
        return ""
    first = min(int(begins * len(found)), len(found) - 1)
    # a hair less, so that a part which ends where a heading begins does not have that heading
    last = min(max(int(ends * len(found) - 1e-9), first), len(found) - 1)
    return "; ".join(found[first : last + 1])
