"""The report page as HTML, and the metrics it shows."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.report.log_rows import facts_spans
from streamsyn.report.page import write_report
from streamsyn.report.run_metrics import MAX_TASKS, OTHER, RunMetrics
from tests import builders
from tests.report.runs import HOSTILE, good_run, rejected, sample_of, scored, written

_VOID = {"meta", "br", "img", "link", "input", "hr", "base"}
_SECTIONS = {
    "verdict",
    "lengths",
    "scores",
    "tasks",
    "rejects",
    "repeats",
    "throughput",
    "tokens",
    "readings",
}


class Parsed(HTMLParser):
    """Checks that open elements are closed in order, and collects tags and texts."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page.decode())
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop(), f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] or "" for tag, attributes in self.tags if tag == "section"}


def page_of(root: Path) -> Parsed:
    return Parsed(write_report(root)[0])


def assert_alone(page: Parsed) -> None:
    """Assert that nothing on the page runs, loads or sends anything."""
    for tag, attributes in page.tags:
        assert tag not in {"script", "img", "link", "iframe", "object", "embed", "form", "base", "a", "use"}
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "href", "srcset"}]
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"] == policies


def test_a_whole_run(tmp_path: Path) -> None:
    """The page has every section and ten samples to read, and loads nothing."""
    page = page_of(good_run(tmp_path))

    assert page.ids == _SECTIONS
    assert_alone(page)
    assert 10 == sum(a.get("class") == "reading" for _, a in page.tags)
    assert "Fit for training" in page.text
    assert "240 contexts" in page.text


def test_cached_tokens_by_tier(tmp_path: Path) -> None:
    """Host memory and storage have a line each where a server has found tokens there."""
    step = {"server": "http://one:1", "prompt_tokens": 900, "cached_tokens": 800}
    warm = scored(1, steps=[step | {"cached_host_tokens": 300}, step | {"cached_host_tokens": 21}])
    page = page_of(written(tmp_path / "tiers", [warm], [sample_of(warm, 0)]))

    assert "of these from host memory" in page.text
    assert "321" in page.text
    assert "of these from storage" not in page.text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """Whatever a field of the log contains is shown as text."""
    names = ("instruction", "answer", "context", "task", "model", "server", "seed_id", "origin")
    hostile: dict[str, Any] = dict.fromkeys(names, HOSTILE)
    checks = {
        "model_answer": HOSTILE,
        "closed_book_answer": HOSTILE,
        "near_duplicate": {"id": HOSTILE, "similarity": 0.9},
        "contaminated": {"ngrams": 3, "file": HOSTILE, "words": HOSTILE},
        "answer_metric": HOSTILE,
    }
    flags = [HOSTILE, "low_context_gain", "near_duplicate", "contaminated"]
    context = scored(1, gain=-1.0, checks=checks, flags=flags, **hostile)
    reject = rejected(2, detail=HOSTILE, instruction=HOSTILE, answer=HOSTILE, id=HOSTILE, task=HOSTILE)
    page = page_of(written(tmp_path / "<b>run</b>", [context, reject], [sample_of(context, 0, [HOSTILE])]))

    assert_alone(page)
    assert page.ids == {*_SECTIONS, "flagged"}
    assert "\x00" not in "".join(page.text)
    assert "\u202e" not in "".join(page.text)
    assert any("<script>" in text for text in page.text)


@pytest.mark.parametrize(
    ("outcomes", "settings"),
    [
        ([], {}),
        ([rejected(1), rejected(2)], {}),
        ([builders.reject(1)], {}),
        ([builders.context(1)], {"assembly.write": False}),
        ([scored(1)], {}),
        ([builders.context(1, checks={}, context="", answer="", instruction="", task="")], {}),
        ([builders.context(1, checks={"words": None, "flags": None, "scoring": None})], {}),
        ([scored(1)], {"assembly.target_tokens": {"schedule": [[0, 100], [50, 900]]}}),
        ([scored(1)], {"recipe.use": "sections"}),
        ([scored(1)], {"recipe.use": "instruction"}),
    ],
)
def test_incomplete_runs_have_a_page(tmp_path: Path, outcomes: list[Any], settings: dict[str, Any]) -> None:
    """Without contexts, samples or scores the page still has all sections."""
    page = page_of(written(tmp_path, outcomes, **settings))

    assert page.ids == _SECTIONS
    assert_alone(page)


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    """The whole rows of open shards count, and the run is not disturbed."""
    with builders.opened(
        written(tmp_path, [scored(1)], is_final=False), builders.sink(shard_bytes=10**6)
    ) as log:
        log.append([scored(2), scored(3)])
        (path,) = (tmp_path / "contexts").glob("*.open")
        with path.open("ab") as file:
            file.write(b'{"seq": 3, "torn')
        metrics = RunMetrics(tmp_path)

    assert (3, False) == (metrics.counts["contexts"], metrics.is_complete)


def test_the_same_directory_gives_the_same_page(tmp_path: Path) -> None:
    """Also in another process with a different hash seed and time zone, and in another place."""
    first = good_run(tmp_path / "run")
    shutil.copytree(first, tmp_path / "elsewhere" / "run")
    pages = []
    for number, root in enumerate((first, tmp_path / "elsewhere" / "run")):
        command = [sys.executable, "-m", "streamsyn", "report", str(root), "--to", "-"]
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "TZ": f"UTC{number}"}
        pages.append(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)

    assert pages[0] == pages[1]
    assert pages[0].startswith(b"<!doctype html>")


def test_further_tasks_are_counted_together(tmp_path: Path) -> None:
    """Memory does not grow with the number of tasks, and every context is counted."""
    metrics = RunMetrics(written(tmp_path, [scored(one, task=f"task {one}") for one in range(100)]))
    tasks = dict(metrics.tasks.sorted())

    assert (MAX_TASKS + 1, 100 - MAX_TASKS) == (len(tasks), tasks[OTHER].contexts)
    assert 10 == len(metrics.samples_to_read.spread())


def test_samples_to_read_show_the_position_of_the_context(tmp_path: Path) -> None:
    """The prompt is split at the relevant passage, even after passages with the same beginning."""
    context = scored(
        1, context="Alike from the start. " * 20 + "And the answer 1 is here.", answer="answer 1"
    )
    others = ["Alike from the start. " * 20 + "But this is another.", "Something else."]
    metrics = RunMetrics(written(tmp_path, [context], [sample_of(context, 0, others)]))
    (example,) = metrics.samples_to_read.spread()

    assert (3, 3, True) == (example.position, example.passages, example.is_in_prompt)
    assert "Something else." in example.before[-1].text
    assert [] == example.after
    assert "Now: What is 1?" in example.question[0].text
    assert ["answer 1"] == [segment.text for segment in example.passage if segment.kind == "answer"]


def test_samples_are_spread_over_tasks(tmp_path: Path) -> None:
    """A task with few contexts is included; the sample does not depend on the log's order."""
    contexts = [scored(one, task="rare" if one % 50 == 0 else "common") for one in range(100)]
    forth = RunMetrics(written(tmp_path / "a", contexts)).samples_to_read.spread()
    back = RunMetrics(written(tmp_path / "b", contexts[::-1])).samples_to_read.spread()

    assert [one.id for one in forth] == [one.id for one in back]
    assert 2 == sum(one.task == "rare" for one in forth)
    assert 10 == len(forth)


def test_the_section_with_the_facts_is_found() -> None:
    """By its tokens, from the start of a paragraph to the start of another."""
    sections = ["one " * 100, "two " * 300, "three " * 100]
    row: dict[str, Any] = {
        "context": "\n\n".join(sections),
        "checks": {"fact_sections": [1], "sections": 3},
        "steps": [{"completion_tokens": tokens} for tokens in (30, 100, 310, 140)],
    }
    ((start, end),) = facts_spans(row)

    assert "two " * 300 + "\n\n" == row["context"][start:end]
    assert [] == facts_spans({**row, "checks": {}})


def test_duplicates_are_shown_beside_what_they_repeat(tmp_path: Path) -> None:
    """The most similar come first, with the beginning of the earlier context."""
    twin = {"near_duplicate": {"id": "seed-1", "similarity": 0.93}}
    weak = {"near_duplicate": {"id": "gone", "similarity": 0.81}}
    contexts = [
        scored(1, context="The first words."),
        scored(2, checks=weak, flags=["near_duplicate"]),
        scored(3, checks=twin, flags=["near_duplicate"]),
    ]
    metrics = RunMetrics(written(tmp_path, contexts))

    assert ["seed-3", "seed-2"] == [match.id for match in metrics.duplicates.items]
    assert {"seed-1": "The first words.", "gone": ""} == metrics.openings


def test_a_damaged_shard_is_reported(tmp_path: Path) -> None:
    """The page shows what could be read, and says what could not."""
    root = good_run(tmp_path)
    path = root / "contexts" / "part-000001.jsonl"
    path.write_bytes(path.read_bytes()[:500])

    assert any("part-000001.jsonl" in text and "verify" in text for text in page_of(root).text)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """No page is written."""
    with pytest.raises(ConfigError, match=r"run\.json"):
        write_report(tmp_path, tmp_path / "report.html")
    assert [] == list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    """It writes into the directory, prints the verdict in one line, and exits with 2 on errors."""
    command = [sys.executable, "-m", "streamsyn", "report"]
    root = good_run(tmp_path / "run")
    done = subprocess.run([*command, root], check=True, capture_output=True, text=True)
    refused = subprocess.run(
        [*command, root, "--to", tmp_path / "no" / "where.html"], check=False, capture_output=True, text=True
    )

    assert done.stdout.startswith(f"{root}/report.html: Fit for training.")
    assert (root / "report.html").read_bytes() == write_report(root)[0]
    assert (2, 1) == (refused.returncode, len(refused.stderr.splitlines()))
    assert "Traceback" not in refused.stderr
