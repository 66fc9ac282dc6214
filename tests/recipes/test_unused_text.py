"""Text beside a pair that no prompt uses is pointed out once."""

from typing import Any

import pytest

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.prompt import UnusedText
from streamsyn.recipes.recipe import BaseRecipe, Steps
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Draft, Seed

PAGE = "Ada Lovelace wrote the first program."


def seed(**metadata: Any) -> Seed:
    return Seed("1", "task", f"Who? {metadata.get('hint', '')}", "Ada.", "a.jsonl:7", metadata)


def said(seeds: list[Seed], capsys: pytest.CaptureFixture[str], **recipe: Any) -> list[str]:
    notice = UnusedText(load_recipe(RecipeSection(**recipe), ChecksSection()))
    for one in seeds:
        notice.look(one)
    return [line for line in capsys.readouterr().out.splitlines() if "seeds.unused_text" in line]


def test_unused_text_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    """With the fields and the place; labels, numbers and what is in the prompt are not meant."""
    quiet = seed(lang="en", year=1843, tags=["a b c d e"], hint="in four words or more")

    [line] = said([quiet, seed(page=PAGE, lang="en"), seed(page=PAGE)], capsys)

    assert "['page']" in line
    assert "a.jsonl:7" in line
    assert [] == said([quiet] * 3, capsys)


def test_a_template_may_use_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Then nothing is pointed out."""
    template = tmp_path / "own.j2"
    template.write_text("{% block user %}{{ instruction }} {{ answer }} {{ metadata.page }}{% endblock %}")

    assert [] == said([seed(page=PAGE)], capsys, template=template)


class Broken(BaseRecipe):
    """A recipe with a bug."""

    def steps(self, draft: Draft) -> Steps:
        raise RuntimeError("a bug")


def test_a_recipe_with_a_bug_is_reported_by_its_worker_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The look ends quietly."""
    UnusedText(Broken(RecipeSection(), ChecksSection())).look(seed(page=PAGE))

    assert "unused_text" not in capsys.readouterr().out
