"""The user message of a sample: a family's template, or the user's own."""

import re
from pathlib import Path
from typing import Any

import pytest

from streamsyn.assembly.sample_prompts import FAMILIES, KNOWN_TASKS, SamplePrompts
from streamsyn.assembly.window import Passage
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError


def message(task: str, contexts: list[str], **section: Any) -> str:
    one = Passage(0, "id", "seed", task, "Who?", "She.", contexts[0], 1)
    return SamplePrompts(AssemblySection.model_validate(section)).user_message(one, contexts)


def test_one_context_alone_is_text_and_instruction() -> None:
    """With n = 1 nothing is added to the context and the instruction, whatever the task."""
    made = {message(task, ["Some text."], contexts_per_sample=1) for task in ("hotpotqa", "summary", "x")}

    assert {"Some text.\n\nWho?"} == made


def test_an_unknown_task_uses_the_general_family() -> None:
    """The general family joins the contexts and adds the instruction."""
    assert "One.\n\nTwo.\n\nWho?" == message("my task", ["One.", "Two."])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_keeps_its_contexts_in_order(family: str) -> None:
    """Every packaged template holds all contexts, once and in order, and the instruction behind them."""
    made = message(family, ["First text.", "Second {{ text }}.", "Third text."])
    places = [made.index(part) for part in ("First text.", "Second {{ text }}.", "Third text.", "Who?")]

    assert sorted(places) == places
    assert [1] * 4 == [made.count(part) for part in ("First", "{{ text }}", "Third", "Who?")]


@pytest.mark.parametrize(("task", "family"), KNOWN_TASKS.items())
def test_a_known_task_uses_the_template_of_its_family(task: str, family: str) -> None:
    """The data sets of LongBench are known by name, in any case."""
    assert message(family, ["a", "b"]) == message(task.upper(), ["a", "b"])


def test_a_task_may_be_given_a_family_or_a_template(tmp_path: Path) -> None:
    """A task's own template comes before the common one, and that before the packaged ones."""
    common, own = tmp_path / "common.j2", tmp_path / "own.j2"
    common.write_text("{{ task }}: {{ contexts | length }}")
    own.write_text("own {{ instruction }}")
    section = {"template": common, "tasks": {"qasper": {"template": own}, "x": {"family": "summary"}}}

    assert ["qmsum: 2", "own Who?", message("summary", ["a", "b"])] == [
        message(task, ["a", "b"], **section) for task in ("qmsum", "qasper", "x")
    ]
    assert "own Who?" == message("qasper", ["a"], contexts_per_sample=1, **section)


def test_an_unknown_family_is_refused() -> None:
    """The message names the key and the known families."""
    with pytest.raises(ConfigError) as raised:
        message("x", ["a"], tasks={"x": {"family": "poem"}})

    for fact in ("assembly.tasks.x.family", "'poem'", *FAMILIES):
        assert fact in str(raised.value)


@pytest.mark.parametrize("key", ["template", "tasks"])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{{ document }}", ": 'document' is undefined; the variables are contexts, instruction, task"),
        ("line\n{% if %}", ":2: "),
        ("{{ contexts | nofilter }}", ":1: No filter named 'nofilter'."),
        ("{{ contexts[1] }}", ": list object has no element 1"),  # a sample may have one context
        ("{{ 1 / 0 }}", ": division by zero"),
        ("{% include 'other' %}", ": no loader for this environment"),
    ],
)
def test_a_wrong_template_is_refused_before_anything_is_sent(
    tmp_path: Path, key: str, text: str, what: str
) -> None:
    """The message names the file, and what is wrong in it."""
    path = tmp_path / "mine.j2"
    path.write_text(text)
    section = {"template": path} if key == "template" else {"tasks": {"x": {"template": path}}}

    with pytest.raises(ConfigError, match=re.escape(f"template {path}{what}")):
        SamplePrompts(AssemblySection.model_validate(section))


def test_a_missing_template_is_refused(tmp_path: Path) -> None:
    """The message names the path."""
    with pytest.raises(ConfigError, match=re.escape(f"cannot read the template {tmp_path / 'none'}: ")):
        SamplePrompts(AssemblySection(template=tmp_path / "none"))


def test_the_fingerprint_is_of_the_packaged_texts() -> None:
    """It is the same for the same version, whatever the configuration."""
    prompts = [SamplePrompts(AssemblySection(contexts_per_sample=n)).fingerprint() for n in (1, 5)]

    assert prompts[0] == prompts[1]
    assert ["assembly.prompts"] == list(prompts[0])
