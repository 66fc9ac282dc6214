"""Templates: what is wrong in one is said with its name, before anything is sent."""

import re
from pathlib import Path

import pytest

from streamsyn.errors import ConfigError
from streamsyn.templates import PromptTemplate, packaged, read
from tests.examples import in_turn

EXAMPLE = {"name": "Ann", "numbers": [1, 2]}


def template(source: str) -> PromptTemplate:
    return PromptTemplate("mine.j2", source, EXAMPLE)


def test_the_whole_file_is_rendered() -> None:
    """White space at the ends goes, lines of control leave no line, nothing is escaped or rendered twice."""
    source = "\n{% for number in numbers %}\n<{{ number }}> {{ name }}\n{% endfor %}\n\n"

    assert "<1> {{ x }} & co\n<2> {{ x }} & co" == template(source).render(
        numbers=[1, 2], name="{{ x }} & co"
    )


def test_blocks_are_rendered_one_by_one() -> None:
    """Each by its name; a file without blocks has none."""
    blocks = template("{% block system %} Be brief. {% endblock %}{% block user %}{{ name }}{% endblock %}")

    assert {"system": "Be brief.", "user": "Bob"} == blocks.render_blocks(name="Bob", numbers=[])
    assert {} == template("{{ name }}").render_blocks(name="Bob", numbers=[])


def test_fixed_lines_stand_in_every_text() -> None:
    """Lines without anything to fill in."""
    assert ["First.", "", "Last."] == template("First.\n\n  {{ name }} and\nLast.").fixed_lines


@in_turn(
    ("source", "what"),
    [
        ("a\nb {{ name", "mine.j2:2: "),
        ("{% if name %}", "mine.j2:1: "),
        ("{{ name | shout }}", "mine.j2:1: No filter named 'shout'."),
        ("{{ nam }}", "mine.j2: 'nam' is undefined; the variables are name, numbers"),
        ("{{ name.first }}", "mine.j2: 'str object' has no attribute 'first'"),
        ("{{ numbers[0] / 0 }}", "mine.j2: division by zero"),
        ("{{ name + 1 }}", "mine.j2: can only concatenate str"),
        ("{{ numbers.index(9) }}", "mine.j2: 9 is not in list"),
        ("{% extends 'base.j2' %}", "mine.j2: no loader for this environment specified"),
        (
            "{% set who = name %}{% block user %}{{ who }}{% endblock %}",
            "mine.j2: 'who' is undefined; the variables are name, numbers",
        ),
    ],
)
def test_a_wrong_template_is_refused(source: str, what: str) -> None:
    """The message names the file, the line where there is one, and the variables that there are."""
    with pytest.raises(ConfigError, match=re.escape(f"template {what}")):
        template(source)


def test_a_template_that_fails_on_other_values_is_named() -> None:
    """What the example did not show is still the template's fault, in one line that names it."""
    good_so_far = template("{% block user %}{{ numbers[1] }}{% endblock %}")

    for render in (good_so_far.render, good_so_far.render_blocks):
        with pytest.raises(ConfigError, match=r"template mine\.j2: list object has no element 1"):
            render(name="Ann", numbers=[1])


def test_a_packaged_template_that_there_is_not_is_named() -> None:
    """As is one that there is, by its text."""
    assert "{{ instruction }}" in packaged("samples", "general")
    with pytest.raises(ConfigError, match="there is no packaged template samples/poem"):
        packaged("samples", "poem")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    """Missing, or no UTF-8."""
    path = tmp_path / "mine.j2"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=re.escape(f"cannot read the template {path}: ")):
        read(path)
