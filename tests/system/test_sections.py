"""Long contexts, written section by section, from end to end: what a kill costs, and what a drain does."""

import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

import pytest

from tests.system.conftest import Server, assert_clean, rows, start, streamsyn, wait_for_line

Serve = Callable[..., Server]
Seeds = Callable[..., Path]

IN_FLIGHT = 4
AT_WORK = IN_FLIGHT + 1
"""So many drafts are at work: one has its answer, and notes it, while others take its place."""
STEPS = 6
"""An outline and five sections a seed: the simulator always writes more than a section may have."""
SETTINGS = [
    *("--set", "recipe.use=sections", "--set", "recipe.target_tokens=300"),
    *("--set", "recipe.section_tokens=60", "--set", "assembly.contexts_per_sample=2"),
    *("--set", f"fleet.max_in_flight={IN_FLIGHT}", "--set", f"fleet.concurrency={IN_FLIGHT}"),
    "--no-progress",
]


def stop_at(requests: int, server: Server, process: Popen[bytes], number: int) -> None:
    """Send a signal when so many requests have come."""
    wait_for_line(process, "run.started")
    while server.stats()["requests"] < requests:
        assert process.poll() is None
    process.send_signal(number)
    process.communicate()


@pytest.mark.crash
@pytest.mark.timeout(120)
def test_finished_steps_survive_a_kill(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """After three kills each seed has its context, and only what was being worked on was asked twice."""
    server, out = serve("--latency-ms", "100"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(24), "--server", server.url, "--out", out, *SETTINGS]
    for requests in (20, 55, 90):
        stop_at(requests, server, start(*arguments), signal.SIGKILL)
        assert (out / "journal.sqlite").exists()
        assert_clean(out)

    done = streamsyn(*arguments)

    assert done.returncode == 0, done.stderr
    contexts = rows(out, "contexts")
    assert 24 == len(contexts) == len({row["seed_id"] for row in contexts}) == len(rows(out, "samples"))
    assert {STEPS} == {len(row["steps"]) for row in contexts}
    assert {300} == {row["checks"]["tokens"] for row in contexts}
    assert 24 * STEPS <= server.stats()["requests"] <= 24 * STEPS + 3 * AT_WORK
    assert [0] * 24 == [row["wasted_tokens"] for row in contexts]
    assert [] == list(out.glob("journal*"))
    assert_clean(out)


@pytest.mark.crash
@pytest.mark.timeout(120)
def test_a_drain_ends_soon_and_loses_nothing(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """SIGTERM lets steps finish, not drafts: a resume asks nothing twice."""
    server, out = serve("--latency-ms", "100"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(24), "--server", server.url, "--out", out, *SETTINGS]
    process = start(*arguments)
    stop_at(40, server, process, signal.SIGTERM)

    assert 75 == process.returncode
    assert server.stats()["requests"] < 40 + 3 * IN_FLIGHT
    assert 0 == streamsyn(*arguments).returncode
    assert 24 == len(rows(out, "contexts"))
    assert 24 * STEPS == server.stats()["requests"]
    assert_clean(out)


@pytest.mark.crash
def test_a_damaged_journal_stops_nothing(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """It is said once, and its steps are asked again."""
    server, out = serve("--latency-ms", "100"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(8), "--server", server.url, "--out", out, *SETTINGS]
    stop_at(20, server, start(*arguments), signal.SIGKILL)
    (out / "journal.sqlite").write_bytes(b"no database" * 1000)
    (out / "journal.sqlite-wal").unlink()  # it would mend the file

    done = streamsyn(*arguments)

    assert done.returncode == 0, done.stderr
    assert 1 == done.stderr.count("journal.damaged")
    assert 8 == len(rows(out, "contexts"))
    assert_clean(out)


def test_a_group_of_seeds_is_worked_on_together(serve: Serve, tmp_path: Path) -> None:
    """Seeds that share a passage are interleaved in the file, and follow each other in the log."""
    template, path, out = tmp_path / "own.j2", tmp_path / "seeds.jsonl", tmp_path / "out"
    template.write_text(
        "{% block group %}{{ metadata.passage }}{% endblock %}"
        "{% block user %}{{ instruction }} {{ answer }}{% endblock %}"
    )
    line = '{"id": "%d-%d", "instruction": "Which is it?", "answer": "Number %d of %d.", "passage": "%s"}\n'
    passages = [f"This is passage {number}. " * 40 for number in range(3)]
    lines = [line % (group, n, n, group, passages[group]) for n in range(10) for group in range(3)]
    path.write_text("".join(lines))
    settings = ["--set", f"recipe.template={template}", "--set", "assembly.write=false", "--no-progress"]
    settings += ["--set", "fleet.max_in_flight=1", "--set", "fleet.concurrency=1"]

    done = streamsyn("run", "--seeds", path, "--server", serve().url, "--out", out, *settings)

    assert done.returncode == 0, done.stderr
    written = [row["id"] for row in rows(out, "contexts")]
    begun = list(dict.fromkeys(name.partition("-")[0] for name in written))
    assert 30 == len(written)
    assert sum(before[0] == after[0] for before, after in pairwise(written)) >= 20
    assert ["0", "1", "2"] == sorted(begun)
