"""Rules that no other tool checks."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import streamsyn

PACKAGE = Path(streamsyn.__file__).parent
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in {"__init__.py", "__main__.py"}]
MAX_LINES = 500
MAX_FUNCTION_LINES = 60
UNSTRUCTURED = {"create_task", "ensure_future", "gather", "wait_for"}


def test_modules_are_one_idea_each() -> None:
    """A module has at most 500 lines and a name of its own; `cli/` names its by command."""
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    names = Counter(path.stem for path in MODULES if path.parent.name != "cli")

    assert {} == {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert [] == [name for name, count in names.items() if count > 1]


def test_functions_fit_on_a_screen_and_tasks_have_an_owner() -> None:
    """No function of 60 lines, no bare `pass` in an `except`, no asyncio task without an owner and a name."""
    found = [
        f"{path}:{problem}" for path in MODULES for problem in problems(ast.parse(path.read_text("utf-8")))
    ]

    assert [] == found


def problems(tree: ast.Module) -> Iterator[str]:
    """Each break of a rule, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                    yield f"{node.lineno} {node.name} is too long"
            case ast.ExceptHandler():
                if all(isinstance(part, ast.Pass) for part in node.body):
                    yield f"{node.lineno} an exception is swallowed"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="asyncio"), attr=name)) if (
                name in UNSTRUCTURED
            ):
                yield f"{node.lineno} asyncio.{name} starts a task that nobody owns"
            case ast.Call(func=ast.Attribute(attr="create_task")):
                if "name" not in {keyword.arg for keyword in node.keywords}:
                    yield f"{node.lineno} an asyncio task without a name"
