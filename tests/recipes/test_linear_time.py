"""Parsing and checks take time in proportion to the text, also for the loops that models fall into."""

import time
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest

from streamsyn.config.sections import ChecksSection
from streamsyn.recipes.checks import Checks
from streamsyn.recipes.parsing import document_text, first_pair, outline_headings, section_text
from streamsyn.records import Seed

_UNITS = [
    "-",
    "\n",
    " ",
    "- ",
    "\n-",
    "no ",
    "Question:\n",
    "Question: x\n",
    "text\n",
    "```\n",
    "[{",
    "**a**\n",
]
_STARTS = ["", "Question: who?", "Question", "Context", "# the text", "Section 1", "I am sorry"]
_SHORT, _FACTOR = 1_000, 16
_SEED = Seed(id="1", task="qa", instruction="-", answer="no", origin="seeds.jsonl:1")
_CHECKS = Checks(ChecksSection())


def _all_checks(text: str) -> None:
    figures = _CHECKS.measure(text)
    _CHECKS.failure(text, figures | {"repetition": 0}, _SEED, ["own line " * 10])
    _CHECKS.part_failure(text, ["own line " * 10], before=text)


@pytest.mark.parametrize(
    "read",
    [
        _all_checks,
        document_text,
        partial(section_text, title="Part", goes_on=True),
        partial(outline_headings, wanted=40),
        first_pair,
    ],
)
def test_time_grows_with_the_length(read: Callable[[str], object]) -> None:
    def seconds(text: str) -> float:
        begun = time.thread_time()
        read(text)
        return time.thread_time() - begun

    slow = {}
    for start, unit in product(_STARTS, _UNITS):
        end = " end" if start else ""
        short = start + unit * (_SHORT // len(unit)) + end
        long = start + unit * (_FACTOR * _SHORT // len(unit)) + end
        before, after = seconds(short), seconds(long)
        if after > 3 * _FACTOR * before + 0.02 and seconds(long) > 0.02:
            slow[start, unit] = before, after
    assert not slow
