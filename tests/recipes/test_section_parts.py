"""Outlines, section texts and lengths: the parts of the recipe `sections`."""

from itertools import cycle, islice

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.recipes.manuscript import Manuscript, title_between
from streamsyn.recipes.parsing import outline_headings, section_text
from streamsyn.records import Completion
from tests.examples import in_turn


@in_turn(
    "outline",
    [
        "1. The river\n2. The mill\n3. The fire",
        "Here is an outline:\n\n1) **The river**\n2) **The mill**\n3) **The fire**\n\nI hope it helps!",
        "# 1. The river\n\n# 2. The mill\n\n# 3. The fire",
        "**1. The river**\n**2. The mill**\n**3. The fire**",
        "I. The river\nII. The mill\nIII. The fire",
        "- The river\n- The mill\n- The fire",
        "Section 1: The river\nSection 2: The mill\nSection 3: The fire",
        "```\n1. The river\n2. The mill\n3. The fire\n```",
        "1. The river:\n2. The mill:\n3. The fire:",
    ],
)
def test_headings_in_many_dresses(outline: str) -> None:
    """Numbers, bullets, marks and remarks round them do not count."""
    assert ["The river", "The mill", "The fire"] == outline_headings(outline, 5)
    assert ["The river", "The mill"] == outline_headings(outline, 2)


@given(st.text())
def test_any_answer_has_some_headings_or_none(answer: str) -> None:
    """Nothing is too odd to be read."""
    found = outline_headings(answer, 3)
    assert len(found) <= 3
    assert all(found)


def test_titles_follow_the_length() -> None:
    """More headings than sections are told together, fewer are told again; none is none."""
    assert ["a; b", "c; d"] == [title_between("abcd", 0, 0.5), title_between("abcd", 0.5, 1)]
    assert ["a", "a", "b", "b"] == [title_between("ab", part / 4, (part + 1) / 4) for part in range(4)]
    assert "" == title_between([], 0, 1)
    assert "b" == title_between("ab", 1, 1)


@in_turn(
    "answer",
    [
        "The mill stood.",
        "## The mill\n\nThe mill stood.",
        "**Section 2: The mill**\nThe mill stood.",
        "Section 2 - The mill\n\nThe mill stood.",
        "The Mill:\nThe mill stood.",
        "```\nThe mill stood.\n```",
    ],
)
def test_a_section_without_its_heading(answer: str) -> None:
    """Nobody asked for one."""
    assert "The mill stood." == section_text(answer, "The mill", goes_on=False)


def test_a_section_that_goes_on_has_no_dots_before_it() -> None:
    """Models like to put them there."""
    assert "and burned." == section_text("... and burned.", "", goes_on=True)
    assert "... and burned." == section_text("... and burned.", "", goes_on=False)
    assert "Part 2 of the fleet sailed." == section_text("Part 2 of the fleet sailed.", "", goes_on=False)


@given(st.integers(1, 5000), st.integers(1, 900), st.lists(st.integers(0, 900), min_size=1))
def test_a_manuscript_ends_near_its_target(target: int, section: int, lengths: list[int]) -> None:
    """Never beyond, and short of it by less than a quarter section unless sections are far too short."""
    manuscript = Manuscript(target, section)
    for length in islice(cycle(lengths), 500):
        if not manuscript.goes_on:
            break
        assert 0 < manuscript.next_tokens <= section
        begins, ends = manuscript.span()
        assert 0 <= begins <= ends <= 1
        told = min(length, manuscript.next_tokens)
        completion = Completion("text", "stop", 1, 0, told, "m", "s")
        ends_now = manuscript.ends_with(completion)
        assert manuscript.may_end or not ends_now
        manuscript.add("text", completion)
        assert ends_now is not manuscript.goes_on
    assert manuscript.tokens <= target
    if not manuscript.goes_on:
        assert manuscript.is_complete or len(manuscript.sections) == 4 * manuscript.planned
