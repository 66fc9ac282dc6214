"""What is imported when a command starts: a guard of its time, without a clock."""

import subprocess
import sys
from pathlib import Path

import orjson
from click.testing import CliRunner

from streamsyn.cli.main import cli
from tests.examples import in_turn
from tests.library.conftest import pairs, serving

HELP = """
import sys
sys.argv = ["streamsyn", "--help"]
from streamsyn.cli.main import main
try:
    main()
finally:
    print(*sys.modules)
"""
RECIPE = """
import sys
from streamsyn.recipes.recipe import BaseRecipe
from streamsyn.records import Document, Request

class Recipe(BaseRecipe):
    def steps(self, draft):
        print(*sys.modules)
        answer = yield Request([{"role": "user", "content": draft.seed.instruction}], self.sampling)
        return Document(answer.text, {"flags": []}, [answer])
"""
LATER = {
    "tokenizers": "assembly",
    "streamsyn.assembly.assembler": "assembly",
    "rich.progress": "progress on a terminal",
    "aiohttp.web": "nothing",
    "pyarrow": "Parquet",
    "datasets": "Parquet",
    "torch": "training",
    "streamsyn.trainer.supervisor": "--train",
    "streamsyn.daemon.serve": "serve",
    "streamsyn.scoring.examiner": "checks that ask servers",
}
"""What needs each module."""


def modules_of(*command: str, cwd: Path | None = None) -> set[str]:
    """The modules that a process names in the last line of its output."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=cwd, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@in_turn("name", sorted(cli.commands))
def test_the_list_of_commands_says_what_their_help_says(name: str) -> None:
    """It is written down apart from them, so that they need not be imported."""
    shown = dict(line.split(maxsplit=1) for line in listed_commands())

    assert (cli.commands[name].help or "").startswith(shown[name].rstrip("."))


def listed_commands() -> list[str]:
    """The lines of commands of `streamsyn --help`, each as one line."""
    result = CliRunner().invoke(cli, ["--help"], terminal_width=200)
    return [line.strip() for line in result.output.partition("Commands:")[2].splitlines() if line.strip()]


def test_help_imports_no_command() -> None:
    """Nor what takes longer to import than click."""
    loaded = modules_of("-c", HELP)

    assert {"streamsyn.cli.main", "click"} <= loaded
    assert set() == {f"streamsyn.cli.{name}" for name in cli.commands} & loaded
    assert set() == {"asyncio", "pydantic", "structlog", "aiohttp", *LATER} & loaded


def test_a_run_imports_no_numpy_before_its_event_loop() -> None:
    """Checks and assembly need it; it is imported while servers are asked for their models."""
    loaded = modules_of("-c", "import sys, streamsyn.library.run_thread; print(*sys.modules)")

    assert "streamsyn.pipeline.run" in loaded
    assert set() == {"numpy", *LATER} & loaded


def test_the_first_request_is_sent_before_other_things_are_imported(tmp_path: Path) -> None:
    """The recipe is asked for it right before. Without assembly, which is imported beside the preflight."""
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "seeds.jsonl").write_bytes(orjson.dumps(pairs(1)[0]))
    options = [
        "--seeds",
        "seeds.jsonl",
        "--out",
        "out",
        "--no-progress",
        "--set",
        "recipe.use=mine:Recipe",
        "--set",
        "assembly.write=false",
    ]
    with serving(words=150) as server:
        run = ["-m", "streamsyn", "run", "--server", server.url, "--no-preflight", *options]
        loaded = modules_of(*run, cwd=tmp_path)

    assert {"aiohttp", "streamsyn.fleet.fleet"} <= loaded
    assert {} == {name: needs for name, needs in LATER.items() if name in loaded}
