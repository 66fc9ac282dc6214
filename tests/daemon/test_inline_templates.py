"""Templates that clients send: what is useful works, and what could reach Python or never end is refused."""

import time
from importlib.resources import files
from typing import Any

import pytest

from streamsyn.daemon.inline_templates import check_template
from streamsyn.daemon.problems import Problem
from streamsyn.errors import ConfigError
from streamsyn.templates import MAX_RENDERED_CHARS, PromptTemplate
from tests.daemon.conftest import Served
from tests.examples import in_turn

PACKAGED = [
    path for folder in ("prompts", "samples") for path in (files("streamsyn") / "data" / folder).iterdir()
]


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_the_packaged_prompts_could_be_sent(path: Any) -> None:
    """What a client is likely to copy and change is allowed."""
    check_template("templates.recipe", path.read_text("utf-8"))


@in_turn(
    ("text", "what"),
    [
        ("{{ instruction.__class__ }} {{ ''.join(x) }}", "a call"),
        ("a\n{{ cycler.__init__.__globals__.os.popen('id') }}", ":2: a call"),
        ("{% for a in range(10**9) %}{% endfor %}", "a loop over anything but a variable"),
        ("{% for a in answer %}{% for b in answer %}{% endfor %}{% endfor %}", "a loop in a loop"),
        ("{% for a in answer %}{% if answer %}{% endif %}{% endfor %}", "'answer' in a loop"),
        ("{% for a, b in metadata %}{% endfor %}", "several variables"),
        ("{{ answer * 10000000 }}", r"`\*`"),
        ("{{ 9 ** 9 ** 9 }}", r"`\*\*`"),
        ("{{ '%999999999d' % 1 }}", "`%`"),
        ("{{ answer" + " ~ answer" * 4 + " }}", "more than 4 variables with `~`"),
        ("{% set x = answer %}", "`set`"),
        ("{% macro m() %}{% endmacro %}", "`macro`"),
        ("{% include '/etc/passwd' %}", "`include`"),
        ("{% extends 'base' %}", "`extends`"),
        ("{{ answer | center(1000000000) }}", "the filter 'center'"),
        ("{{ answer | replace('', answer) }}", "the filter 'replace'"),
        ("{{ metadata.x | join(answer) }}", "not a constant"),
        ("{{ [answer, answer] }}", "`list`"),
        ("{{ answer[1:] }}", "`slice`"),
        ("{{ answer }}" * 201, "more than 200 times"),
        ("{{ answer", "templates.recipe:1: "),
        ("{{ " + "(" * 5000, "templates.recipe"),
        ("x" * 70_000, "longer than"),
    ],
)
def test_what_is_refused(text: str, what: str) -> None:
    """The message names the template, the line and what is not allowed."""
    with pytest.raises(Problem, match=what) as raised:
        check_template("templates.recipe", text)
    assert raised.value.status == 422


def test_no_template_reaches_python_or_fills_the_memory() -> None:
    """The sandbox holds for templates of files too, and a text is given up when it grows too long."""
    with pytest.raises(ConfigError, match="unsafe"):
        PromptTemplate("mine", "{{ name.__class__.__mro__ }}", {"name": "x"})

    template = PromptTemplate(
        "mine", "{% for n in numbers %}{{ name }}{% endfor %}", {"name": "", "numbers": []}
    )
    began = time.monotonic()
    with pytest.raises(ConfigError, match="longer than"):
        template.render(name="x" * (MAX_RENDERED_CHARS // 4), numbers=range(10**9))
    assert time.monotonic() - began < 5


async def test_a_run_with_templates_of_its_own(daemon: Served) -> None:
    """Both are used, also after they were read back from disk."""
    templates = {
        "recipe": "{% block user %}{{ target_words }} words: {{ instruction }} {{ answer }}{% endblock %}",
        "assembly": "{% for context in contexts %}[{{ context }}]{% endfor %} Q: {{ instruction }}",
    }
    await daemon.new_run("own", templates=templates)
    await daemon.submit("own", 2)
    await daemon.ask("POST", "/v1/runs/own/close")
    await daemon.until_state("own", "finished")
    samples = (daemon.daemon.root / "runs" / "own" / "samples" / "part-000000.jsonl").read_text()
    assert "Q: What of 0?" in samples


async def test_a_template_that_cannot_work_creates_no_run(daemon: Served) -> None:
    """An unknown variable shows before the run is created, under the name that the client knows."""
    problem = await daemon.refused("POST", "/v1/runs", {"id": "x", "templates": {"recipe": "{{ nothing }}"}})
    assert problem["status"] == 422
    assert problem["detail"].startswith("template templates.recipe: 'nothing' is undefined")
    assert (await daemon.refused("GET", "/v1/runs/x"))["status"] == 404
    assert list((daemon.daemon.root / "runs").iterdir()) == []
