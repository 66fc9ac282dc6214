"""The page of the public names is up to date, and whole."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import streamsyn
from tests.examples import in_turn

ROOT = Path(streamsyn.__file__).parents[1]
FOLDER = ROOT / "deploy" / "library"
SCRIPT = runpy.run_path(str(FOLDER / "write_reference.py"))
PAGE = (FOLDER / "README.md").read_text("utf-8")


def test_the_page_is_up_to_date() -> None:
    """If not, run `python deploy/library/write_reference.py`."""
    assert SCRIPT["page"]() == PAGE


@in_turn("name", [name for name in streamsyn.__all__ if name != "__version__"])
def test_every_public_name_is_on_the_page(name: str) -> None:
    """With its methods or arguments; and it has a docstring of its own."""
    one = getattr(streamsyn, name)
    assert one.__doc__
    if inspect.isclass(one) and issubclass(one, Exception):
        assert f"- `{name}(" in PAGE
        return
    assert f"### {name}\n" in PAGE
    functions = {part for part, value in vars(one).items() if inspect.isfunction(value) and part[0] != "_"}
    methods = [f"{name}.{part}(" for part in functions & SCRIPT["SHOWN"].get(name, functions)]
    parameters = [
        f"- `{part}`: " for part in inspect.signature(one).parameters if name in ("open_run", "follow")
    ]
    assert [] == [part for part in methods + parameters if part not in PAGE]


def test_public_names_are_imported_when_they_are_used() -> None:
    """So that the command line starts fast; they are listed for completion, and no others exist."""
    script = """
import sys, streamsyn
assert {"asyncio", "pydantic", "aiohttp"}.isdisjoint(sys.modules), "imported at once"
assert set(streamsyn.__all__) <= set(dir(streamsyn))
assert streamsyn.open_run.__name__ == "open_run"
assert "torch" not in sys.modules
assert not hasattr(streamsyn, "pipelin")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (0, "") == (done.returncode, done.stderr)
