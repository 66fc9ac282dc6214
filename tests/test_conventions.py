"""Rules of the house that no other tool checks."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import streamsyn

PACKAGE = Path(streamsyn.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_modules_are_short() -> None:
    """No module is above 350 lines, the median is at most 120."""
    lengths = [lines_of(path) for path in MODULES if lines_of(path) > 3]

    assert max(lengths) <= 350
    assert statistics.median(lengths) <= 120


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_fit_on_a_screen(path: Path) -> None:
    """No function needs scrolling, and no exception is swallowed by a bare pass."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(part, ast.Pass) for part in node.body), f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_asyncio_tasks_are_born_in_groups(path: Path) -> None:
    """No asyncio task is started outside a TaskGroup, and each has a name."""
    text = path.read_text("utf-8")

    assert [] == re.findall(r"asyncio\.(?:create_task|ensure_future|gather|wait_for)\(", text)
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "create_task"
        ):
            assert "name" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"
