"""`streamsyn export` as a command: options, output, exit codes and the card."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from streamsyn.cli.export import export
from streamsyn.errors import ConfigError
from streamsyn.records import Outcome
from tests.builders import reject
from tests.export.support import make_run, rows_of, scored, tree
from tests.system.conftest import fork_server, streamsyn  # noqa: F401 - a fixture of the session


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcomes: list[Outcome] = [*(scored(n) for n in range(40)), *(reject(n) for n in range(3))]
    return make_run(tmp_path_factory.mktemp("run"), outcomes)[0]


def invoke(*arguments: object) -> str:
    """Run the command in this process; return its stdout."""
    result = CliRunner().invoke(export, list(map(str, arguments)), catch_exceptions=False)
    assert 0 == result.exit_code, result.output
    return result.stdout


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return streamsyn("export", *arguments)


def shapes(folder: Path) -> set[tuple[int, int]]:
    """(contexts, relevant_index) of each row."""
    return {(len(row["context_seqs"]), row["relevant_index"]) for row in rows_of(folder)}


def test_the_summary_is_printed_on_stdout(run: Path, tmp_path: Path) -> None:
    """Counts, files and splits; nothing on stderr, and exit code 0."""
    done = command(run, "--to", tmp_path / "out", "--split", "train=0.9,test=0.1", "--format", "parquet")

    assert (0, "") == (done.returncode, done.stderr)
    first, *splits = done.stdout.splitlines()
    assert first.startswith(f"{run} -> {tmp_path / 'out'}: 40 samples of 40 contexts, 0.0")
    assert first.endswith(" MB in 2 files")
    assert ["test", "train"] == [line.split()[1] for line in splits]
    assert 40 == sum(int(line.split()[0]) for line in splits)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "nowhere://x"], "Protocol not known"),
        (["--to", "s3://bucket/x"], "Install s3fs"),
        (["--to", "TMP/out", "--set", "recipe.use=sections"], "recipe.use"),
        (["--to", "TMP/out", "--set", "assembly.positon=0"], "the nearest known one is assembly.position"),
        (["--to", "TMP/out", "--position", "2"], "assembly.position"),
        (["--to", "TMP/out", "--compression", "lz4"], "--compression"),
        (["--to", "TMP/out", "--split", "train=0.5"], "add up to 0.5"),
        (["--to", "TMP/out", "--shard-bytes", "12 parsecs"], "invalid size"),
        (["--to", "TMP/out", "--config", "TMP/none.toml"], "none.toml"),
        (["--to", "TMP"], "is not empty"),
        ([], "--to"),
    ],
)
def test_an_invalid_option_is_one_line_and_code_2(
    run: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    """No traceback, and nothing is written."""
    (tmp_path / "file").write_text("!")
    done = command(run, *(word.replace("TMP", str(tmp_path)) for word in arguments))

    assert (2, "") == (done.returncode, done.stdout)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert {"file": tree(tmp_path)["file"]} == tree(tmp_path)


def test_a_folder_without_a_run_is_code_2(tmp_path: Path) -> None:
    """The message says what is missing."""
    done = command(tmp_path, "--to", tmp_path / "out")

    assert 2 == done.returncode
    assert done.stderr.endswith("is not a run directory: it has no run.json\n")


def test_options_for_assembly(run: Path, tmp_path: Path) -> None:
    """The common keys have options of their own; `--set` overrides them."""
    invoke(run, "--to", tmp_path / "a", "--contexts-per-sample", 5, "--position", 1)
    invoke(run, "--to", tmp_path / "b", "--target-tokens", 40, "--position", "[0.0]")
    invoke(run, "--to", tmp_path / "c", "--distractors", "none", "--epoch", 3)
    invoke(run, "--to", tmp_path / "d", "--position", 0, "--set", "assembly.position=1")

    assert {(5, 4)} == shapes(tmp_path / "a")
    assert {(4, 0)} == shapes(tmp_path / "b")
    assert {(1, 0)} == shapes(tmp_path / "c")
    assert {3} == {row["epoch"] for row in rows_of(tmp_path / "c")}
    assert {(3, 2)} == shapes(tmp_path / "d")


def test_a_number_of_contexts_replaces_a_length(tmp_path: Path) -> None:
    """In a run with a target in tokens, `--contexts-per-sample` would otherwise do nothing."""
    root, _ = make_run(tmp_path / "run", [scored(n) for n in range(30)], target_tokens=50)
    invoke(root, "--to", tmp_path / "out", "--contexts-per-sample", 2, "--position", 0)

    assert {(2, 0)} == shapes(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        ["--contexts-per-sample", "2"],
        ["--format", "parquet", "--compression", "snappy", "--split", "task", "--shard-rows", "3"],
        ["--format", "datasets", "--split", "a=0.5,b=0.5", "--split-seed", "7", "--shard-bytes", "4KB"],
        ["--epochs", "2", "--license", "cc-by-4.0", "--target-tokens", "{uniform = [20, 40]}"],
        ["--distractors", "{same_task = 1, any_task = 2}", "--position", "[0.0, 1.0]"],
    ],
)
def test_the_command_on_the_card_repeats_the_export(run: Path, tmp_path: Path, options: list[str]) -> None:
    """With the two placeholders filled in, it gives the same bytes."""
    invoke(run, "--to", tmp_path / "a", *options)
    card = (tmp_path / "a/README.md").read_text("utf-8")
    line = next(line for line in card.splitlines() if line.startswith("streamsyn export"))
    folders = {"RUN_DIRECTORY": run, "FOLDER": tmp_path / "b"}
    invoke(*(folders.get(word, word) for word in shlex.split(line)[2:]))

    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_contents_of_the_card(run: Path, tmp_path: Path) -> None:
    """Counts by task, lengths, scores, flags, rejects and settings, but no path and no time."""
    invoke(run, "--to", tmp_path / "out", "--split", "train=0.5,test=0.5")
    card = (tmp_path / "out/README.md").read_text("utf-8")

    assert "\nlicense: unknown\n" in card
    assert "| Räte & Co |" in card
    assert "| not_a_seed | 3 |" in card
    assert "| all | context_gain | 40 |" in card
    assert "| truncated | 8 |" in card
    assert "contexts written by model | 40 |" in card
    assert "assembly.contexts_per_sample = 3" in card
    assert str(tmp_path) not in card
    assert str(run) not in card


def test_a_licence_is_the_users_to_choose(run: Path, tmp_path: Path) -> None:
    """A given licence is in the header; what is not an identifier is refused."""
    invoke(run, "--to", tmp_path / "out", "--license", "cc-by-4.0")
    assert "license: cc-by-4.0\n" in (tmp_path / "out/README.md").read_text("utf-8")
    with pytest.raises(ConfigError, match="--license"):
        invoke(run, "--to", tmp_path / "b", "--license", "my own: one")


def test_an_unfinished_run_is_noted(tmp_path: Path) -> None:
    """The summary and the card say that it is not finished, and how many contexts wait."""
    root, _ = make_run(tmp_path / "run", [scored(n) for n in range(8)], to_the_end=False)
    printed = invoke(root, "--to", tmp_path / "out")

    assert "contexts still lack distractors" in printed
    assert "note: the run is not finished" in printed
    assert "was not finished when this was made" in (tmp_path / "out/README.md").read_text("utf-8")


def test_progress_is_for_stderr(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is logged as text, or as JSON for programs."""
    monkeypatch.setattr("streamsyn.export.export_run._PROGRESS_INTERVAL_S", 0)
    result: Any = CliRunner().invoke(export, [str(run), "--to", str(tmp_path / "out"), "--log-json"])
    events = [orjson.loads(line) for line in result.stderr.splitlines()]

    assert 40 == len(events) == events[-1]["samples"]
    assert "export.progress" == events[0]["event"]
    assert 1 == len(result.stdout.splitlines())
