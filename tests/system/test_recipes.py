"""Documents in, pairs out; and recipes of the user's own: from end to end, through kills."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from streamsyn.records import draft_key
from streamsyn.simulator.texts import Prose
from tests.system.conftest import Server, assert_clean, rows, start, streamsyn, wait_for_line

Serve = Callable[..., Server]
Seeds = Callable[..., Path]

ROOT = Path(__file__).parents[2]
HEADING = "## A recipe of your own\n"
ONE_AT_A_TIME = ["--set", "fleet.max_in_flight=1", "--set", "fleet.concurrency=1", "--no-progress"]
LOST = 3
"""Answers that a kill may cost, one at a time: that in flight, and those on their way to the disk."""
BUGGY = """
from streamsyn.recipes.recipe import BaseRecipe
from streamsyn.records import Document, Request

class Mine(BaseRecipe):
    def steps(self, draft):
        answer = yield Request([{"role": "user", "content": "Write."}], self.sampling)
        if draft.seed.instruction.startswith(self.options["breaks"]):
            raise LookupError("no such thing")
        return Document(answer.text, {"flags": []}, [answer])
"""


def documents(path: Path, number: int, words: int = 300) -> Path:
    """A file of documents, all different, with a title each."""
    prose = Prose(99)
    lines = [json.dumps({"context": prose.write(words), "id": f"d{n}", "title": n}) for n in range(number)]
    path.write_text("\n".join(lines) + "\n")
    return path


def stop_at(requests: int, server: Server, process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal when so many requests have come."""
    wait_for_line(process, "run.started")
    while server.stats()["requests"] < requests:
        assert process.poll() is None
    process.send_signal(number)
    process.communicate()


def example() -> tuple[str, str]:
    """The recipe that the README of the recipes shows, and its configuration."""
    shown = (ROOT / "streamsyn/recipes/README.md").read_text("utf-8").split(HEADING, 1)[1]
    blocks = re.findall(r"```(python|toml)\n(.*?)```", shown, re.DOTALL)
    recipe = next(text for kind, text in blocks if kind == "python" and "class " in text)
    return recipe, next(text for kind, text in blocks if kind == "toml" and "use = " in text)


@pytest.mark.crash
@pytest.mark.timeout(120)
def test_pairs_are_written_for_documents(serve: Serve, tmp_path: Path) -> None:
    """Through a kill and a drain: each draft has one context, with the pair the LLM wrote, and a sample."""
    server, out = serve("--latency-ms", "60", "--seed", "7"), tmp_path / "out"
    path = documents(tmp_path / "books.jsonl", 20)
    settings = ["--set", "recipe.use=instruction", "--set", "recipe.window_words=80"]
    settings += ["--set", "recipe.contexts_per_seed=2", "--set", "assembly.contexts_per_sample=2"]
    arguments = ["run", "--seeds", path, "--server", server.url, "--out", out, *settings, *ONE_AT_A_TIME]
    stop_at(8, server, start(*arguments), signal.SIGKILL)
    assert_clean(out)
    stop_at(20, server, start(*arguments), signal.SIGTERM)
    done = streamsyn(*arguments)

    assert done.returncode == 0, done.stderr
    contexts, samples = rows(out, "contexts"), rows(out, "samples")
    assert {f"d{n}" for n in range(20)} | {f"d{n}#1" for n in range(20)} == {row["id"] for row in contexts}
    assert 40 == len(contexts) == len(samples)
    asked = server.stats()["requests"]
    assert 40 <= asked <= 40 + LOST
    prose = Prose(7)
    written = {prose.pair() for _ in range(asked)}
    assert {f"Question: {row['instruction']}\nAnswer: {row['answer']}" for row in contexts} <= written
    books = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {book["id"]: book["context"].split() for book in books}
    for row in contexts:
        first, words, of = row["checks"]["window"]
        assert texts[row["seed_id"]][first : first + words] == row["context"].split()
        assert (80, len(texts[row["seed_id"]])) == (words, of)
        assert ["title"] == list(row["metadata"])
    for sample in samples:
        row = contexts[sample["context_seqs"][sample["relevant_index"]]]
        user, assistant = (message["content"] for message in sample["messages"])
        assert row["answer"] == assistant
        assert user.count(row["instruction"]) == user.count(row["context"]) == 1
    assert_clean(out)


@pytest.mark.crash
def test_documents_through_a_pipe(serve: Serve, tmp_path: Path) -> None:
    """What was read before a kill is finished without the pipe; a bad line and a bad answer are rejects."""
    server, out = serve("--latency-ms", "100"), tmp_path / "out"
    path = documents(tmp_path / "books.jsonl", 30)
    with path.open("a") as file:
        file.write('{"instruction": "Who?", "answer": "Ada."}\n{"context": "Too short.", "id": "short"}\n')
    settings = ["--set", "recipe.use=instruction", *ONE_AT_A_TIME]
    with path.open("rb") as pipe:
        process = start("run", "--seeds", "-", "--server", server.url, "--out", out, *settings, stdin=pipe)
        stop_at(10, server, process, signal.SIGKILL)
    done = streamsyn("run", "--out", out, *ONE_AT_A_TIME)

    assert done.returncode == 0, done.stderr
    assert 30 == len(rows(out, "contexts"))
    rejects = {row["origin"]: (row["reason"], row["detail"]) for row in rows(out, "rejects")}
    missing = "field 'context' is missing; fields: answer, instruction; "
    assert {
        "-:31": ("not_a_seed", f"{missing}set seeds.fields.context to the field with the document"),
        "-:32": ("too_short", "the document has 2 words, fewer than checks.min_words = 50"),
    } == rejects
    assert_clean(out)


def test_answers_without_a_pair_are_rejects(serve: Serve, tmp_path: Path) -> None:
    """Each document is asked about `recipe.tries` times."""
    server, out = serve("--fault", "short=1"), tmp_path / "out"
    path = documents(tmp_path / "books.jsonl", 4)
    settings = ["--set", "recipe.use=instruction", "--set", "run.max_reject_fraction=1", "--no-progress"]

    assert 0 == streamsyn("run", "--seeds", path, "--server", server.url, "--out", out, *settings).returncode

    assert ["no_pair"] * 4 == [row["reason"] for row in rows(out, "rejects")]
    assert 12 == server.stats()["requests"]
    assert_clean(out)


def test_another_kind_of_seed_is_another_run(serve: Serve, tmp_path: Path) -> None:
    """A directory of pairs is not gone on with as one of documents: the key is named."""
    out, path = tmp_path / "out", documents(tmp_path / "books.jsonl", 2)
    arguments = ["run", "--seeds", path, "--server", serve().url, "--out", out, "--no-progress"]
    assert 0 == streamsyn(*arguments, "--set", "recipe.use=instruction").returncode

    refused = streamsyn(*arguments, "--set", "recipe.use=context")

    assert (2, True) == (
        refused.returncode,
        "recipe.use: 'instruction' before, 'context' now" in refused.stderr,
    )


@pytest.mark.crash
@pytest.mark.timeout(120)
def test_the_recipe_in_the_readme(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """It works as it stands there, from the working directory, through a kill: no finished step is lost."""
    code, settings = example()
    (tmp_path / "my_recipes.py").write_text(code)
    (tmp_path / "run.toml").write_text(settings)
    server, out = serve("--latency-ms", "100"), tmp_path / "out"
    arguments = [
        "run",
        "run.toml",
        "--seeds",
        seeds(12),
        "--server",
        server.url,
        "--out",
        out,
        *ONE_AT_A_TIME,
    ]
    stop_at(9, server, start(*arguments, cwd=tmp_path), signal.SIGKILL)
    stop_at(16, server, start(*arguments, cwd=tmp_path), signal.SIGTERM)
    done = streamsyn(*arguments, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    contexts = rows(out, "contexts")
    assert 12 == len({row["seed_id"] for row in contexts}) == len(contexts) == len(rows(out, "samples"))
    assert {2} == {len(row["steps"]) for row in contexts}
    assert 24 <= server.stats()["requests"] <= 24 + LOST
    styles = re.findall(r'"(.*?)"', code.split("STYLES = (")[1].split(")")[0])
    for row in contexts:
        assert Random(draft_key(row["seed_id"], row["draft"])).choice(styles) == row["checks"]["style"]
    assert_clean(out)

    (tmp_path / "my_recipes.py").write_text(code + "\n# changed")
    refused = streamsyn(*arguments, cwd=tmp_path)
    assert (2, True) == (refused.returncode, "recipe.source: " in refused.stderr)
    shown = streamsyn("preview", "run.toml", "--seeds", seeds(1), cwd=tmp_path)
    assert (0, True) == (shown.returncode, "List 7 facts, one a line" in shown.stdout), shown.stderr


def test_the_console_script_finds_it_too(seeds: Seeds, tmp_path: Path) -> None:
    """In the working directory, which is not on the path of a script."""
    script = Path(sys.executable).with_name("streamsyn")
    (tmp_path / "mine.py").write_text(BUGGY)
    arguments: list[Any] = [script, "preview", "--set", "recipe.use=mine:Mine", "--seeds", seeds(1)]
    if not script.exists():
        arguments[:1] = [sys.executable, "-P", "-c", "from streamsyn.cli.main import main; main()"]
    shown = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (0, True) == (shown.returncode, "--- user\nWrite." in shown.stdout), shown.stderr


def run_buggy(serve: Serve, seeds: Seeds, folder: Path, breaks: str) -> tuple[Any, Path]:
    (folder / "mine.py").write_text(BUGGY)
    settings = [
        "--set",
        "recipe.use=mine:Mine",
        "--set",
        f'recipe.options.breaks="{breaks}"',
        "--no-progress",
    ]
    settings += ["--set", "run.max_consecutive_bugs=3", *ONE_AT_A_TIME]
    out = folder / "out"
    arguments = ["run", "--seeds", seeds(12), "--server", serve().url, "--out", out, *settings]
    return streamsyn(*arguments, cwd=folder), out


def test_a_bug_in_it_costs_its_seed(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """The reject holds the traceback; all others have contexts."""
    done, out = run_buggy(serve, seeds, tmp_path, "Who kept lighthouse 7 ")

    assert done.returncode == 0, done.stderr
    [reject] = rows(out, "rejects")
    assert "internal_error" == reject["reason"]
    assert "mine.py" in reject["detail"]
    assert "LookupError: no such thing" in reject["detail"]
    assert 11 == len(rows(out, "contexts"))
    assert_clean(out)


def test_a_bug_with_every_seed_ends_the_run(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """After `run.max_consecutive_bugs`, with the traceback, and without rejects for all there is."""
    done, out = run_buggy(serve, seeds, tmp_path, "Who")

    assert (1, True) == (done.returncode, "LookupError: no such thing" in done.stderr)
    assert len(rows(out, "rejects")) < 3
    assert [] == rows(out, "contexts")
    assert_clean(out)


def test_what_cannot_be_loaded_is_one_line(seeds: Seeds, tmp_path: Path) -> None:
    """Exit code 2, before any server is asked."""
    (tmp_path / "mine.py").write_text("\n\nimport nowhere_at_all\n")
    base = ["run", "--seeds", seeds(1), "--server", "http://127.0.0.1:9", "--out", tmp_path / "out"]
    for use, said in [
        ("mine:Mine", f"raised ModuleNotFoundError: No module named 'nowhere_at_all' ({tmp_path}/mine.py:3)"),
        ("yours:Mine", "No module named 'yours'"),
        ("instructions", "the nearest is 'instruction'"),
    ]:
        refused = streamsyn(*base, "--set", f"recipe.use={use}", cwd=tmp_path)
        assert (2, 1) == (refused.returncode, len(refused.stderr.splitlines())), refused.stderr
        assert said in refused.stderr
