"""Plug-in recipes: how they are loaded, and the errors when they cannot be used."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.recipe import BaseRecipe, Recipe
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Document, Draft, Seed
from tests.examples import in_turn
from tests.recipes.test_context import PROSE, SEED, completion_of

MINE = """
from streamsyn.recipes.recipe import BaseRecipe
from streamsyn.records import Document, Request

class Mine(BaseRecipe):
    def steps(self, draft):
        answer = yield Request([{"role": "user", "content": self.options["ask"]}], self.sampling)
        return Document(answer.text, {"flags": []}, [answer])
"""

Write = Callable[..., None]


def with_line(line: str) -> str:
    """It, with one more line in the class."""
    return MINE.replace("def steps", f"{line}\n    def steps")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into a working directory that is not on Python's path, as for a console script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file may change within a second
    before = set(sys.modules)

    def written(text: str, name: str = "mine.py") -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        forget()
        importlib.invalidate_caches()

    def forget() -> None:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or tmp_path).startswith(str(tmp_path)):
                del sys.modules[name]

    yield written
    forget()


def loaded(use: str = "mine:Mine", **options: Any) -> Recipe:
    """The recipe under a configuration."""
    return load_recipe(RecipeSection(use=use, options={"ask": "What?", **options}), ChecksSection())


def error_of(use: str = "mine:Mine") -> str:
    """Return the error for a recipe that cannot be used: one line that names it."""
    with pytest.raises(ConfigError) as raised:
        loaded(use)
    text = str(raised.value)
    assert "\n" not in text
    assert "recipe.use" in text
    return text


def test_steps_are_all_it_needs(write: Write) -> None:
    """A class below BaseRecipe, in a module of the working directory; options are its own."""
    write(MINE)
    made = loaded()
    steps = made.steps(Draft(SEED))
    request = next(steps)
    assert ("What?", {"temperature": 0.8, "max_tokens": 4096}) == (
        request.messages[0]["content"],
        request.sampling,
    )
    with pytest.raises(StopIteration) as done:
        steps.send(completion_of(PROSE))
    assert Document(PROSE, {"flags": []}, [completion_of(PROSE)]) == done.value.value
    assert (False, "", "") == (made.takes_documents, made.group(SEED), made.outlook())


def test_it_may_lie_in_a_package_and_be_made_by_a_function(write: Write) -> None:
    """Whatever is called with both sections and returns a recipe."""
    write("", "my_package/__init__.py")
    write(MINE, "my_package/mine.py")
    write(
        "from .mine import Mine\ndef make(recipe, checks):\n    return Mine(recipe, checks)",
        "my_package/make.py",
    )
    assert loaded("my_package.make:make").takes_documents is False


def test_it_may_take_documents(write: Write) -> None:
    """Then it says so, and its seeds are."""
    write(with_line("takes_documents = True"))
    assert loaded().takes_documents is True


def test_it_need_not_be_below_our_class(write: Write) -> None:
    """What counts is what it has."""
    write(
        "class Mine:\n"
        "    takes_documents = False\n"
        "    def __init__(self, recipe, checks): pass\n"
        "    def steps(self, draft): yield\n"
        "    def group(self, seed): return seed.task\n"
        "    def outlook(self): return 'more'\n"
        "    def fingerprint(self): return {'mine': '1'}\n"
    )
    made = loaded()
    assert ("qa", "more", "1") == (made.group(SEED), made.outlook(), made.fingerprint()["mine"])


def test_its_source_is_part_of_the_fingerprint(write: Write) -> None:
    """Other code makes other outputs: its own, and that of the module where its class is."""
    write(MINE)
    first = loaded().fingerprint()
    assert ["recipe.source"] == list(first)
    assert first == loaded().fingerprint()
    write(MINE + "\n# changed")
    assert first != loaded().fingerprint()
    write("from mine import Mine", "elsewhere.py")
    second = loaded("elsewhere:Mine").fingerprint()
    write(MINE)
    assert second != loaded("elsewhere:Mine").fingerprint()


@in_turn("use", ["mine:", ":Mine", "mine:Mine:", "my mine:Mine", ".mine:Mine", "mine.py:Mine.x", "a/b:C"])
def test_an_invalid_name_is_refused(use: str) -> None:
    """The error shows a valid name."""
    assert "my_package.recipes:Mine" in error_of(use)


def test_a_module_that_is_not_there(write: Write) -> None:
    """It is named: it, or the package that it should be in."""
    write("", "my_package/__init__.py")
    assert "No module named 'nowhere'" in error_of("nowhere:Mine")
    assert "No module named 'my_package.mine'" in error_of("my_package.mine:Mine")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "import nowhere_at_all",
            "importing mine raised ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("\n\n1 / 0", "raised ZeroDivisionError: division by zero"),
        ("\n\nimport json; json.loads('')", "raised JSONDecodeError: Expecting value"),
        ("\n\ndef steps(:", "raised SyntaxError: invalid syntax"),
        ("\n\nraise SystemExit('no licence')", "raised SystemExit: no licence"),
        ("\n\nraise ValueError('one\\ntwo')", "raised ValueError: one two"),
    ],
)
def test_a_module_that_cannot_be_imported(write: Write, tmp_path: Path, text: str, expected: str) -> None:
    """Its error, and the line of it where that arises."""
    write(text)
    line = text.count("\n") + 1
    message = error_of()
    assert expected in message
    assert message.endswith(f"({tmp_path}/mine.py:{line})")


def test_an_import_below_that_fails(write: Write, tmp_path: Path) -> None:
    """A missing module of theirs is not taken for the one that was asked for."""
    write("import my_package.nowhere", "my_package/mine.py")
    message = error_of("my_package.mine:Mine")
    assert "importing my_package.mine raised ModuleNotFoundError" in message
    assert f"{tmp_path}/my_package/mine.py:1" in message


def test_a_name_that_is_not_in_the_module(write: Write, tmp_path: Path) -> None:
    """The nearest is named."""
    write(MINE)
    assert f"there is no 'Mime' in {tmp_path}/mine.py; the nearest is 'Mine'" in error_of("mine:Mime")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mine = 3", "Mine is of type int"),
        (
            "def Mine(recipe): pass",
            "called as Mine(RecipeSection, ChecksSection), but does not accept these arguments: too",
        ),
        ("class Mine:\n    def __init__(self, *, x): pass", "does not accept"),
        ("def Mine(a, b):\n    return len(3)", "raised TypeError: object of type 'int' has no len() ("),
        ("def Mine(a, b):\n    return a.options['size']", "raised KeyError: 'size' ("),
        ("def Mine(a, b):\n    return 3", "int has no steps, group, outlook, fingerprint, takes_documents; "),
        (MINE.replace("BaseRecipe)", "object)").replace("steps", "stets"), "does not accept"),
        (MINE.replace("def steps", "def stets"), "abstract"),
        (with_line("group = 3"), "Mine has no group; "),
        (with_line("takes_documents = 'yes'"), "Mine has no takes_documents; "),
        (MINE + "\n    async def steps(self, draft): ...", "steps is `async def`"),
        (MINE.replace("def steps", "async def steps"), "SyntaxError: 'return' with value in async generator"),
        (with_line("def fingerprint(self): return {}['x']"), "fingerprint() raised KeyError"),
        (with_line("def fingerprint(self): return {'x': {1}}"), "fingerprint() raised"),
    ],
)
def test_an_object_that_is_not_a_recipe_is_refused(write: Write, text: str, expected: str) -> None:
    """The error says what it lacks, before any request."""
    write(text)
    assert expected in error_of()


def test_its_own_configuration_errors_are_passed_on(write: Write) -> None:
    """Their text reaches the user unchanged."""
    write("from streamsyn.errors import ConfigError\ndef Mine(a, b):\n    raise ConfigError('size is wrong')")
    with pytest.raises(ConfigError, match=r"^size is wrong$"):
        loaded()


def test_a_failing_group_is_no_group(write: Write) -> None:
    """It saves time, and decides nothing: a bug in it must not end a run."""
    write(with_line("def group(self, seed): return seed.metadata['book']"))
    made = loaded()
    assert ["", "b"] == [made.group(SEED), made.group(Seed("s", "t", "i", "a", "f", {"book": "b"}))]


def test_the_base_keeps_what_a_recipe_needs() -> None:
    """Section, options, checks, sampling, as configured."""

    class Mine(BaseRecipe):
        def steps(self, draft: Draft) -> Any:
            raise NotImplementedError

    section = RecipeSection(options={"a": 1}, temperature=0.1, max_tokens=5, sampling={"top_p": 0.5})
    made = Mine(section, ChecksSection(min_words=2))
    assert ({"a": 1}, section) == (made.options, made.section)
    assert {"temperature": 0.1, "max_tokens": 5, "top_p": 0.5} == made.sampling
    assert made.checks.failure("One.", made.checks.measure("One."), SEED, []) is not None
