"""Runs under the daemon: from their creation to their deletion, over HTTP."""

import asyncio
import gc
import random
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import Served, StartDaemon, seed_lines


async def test_a_run_from_its_creation_to_its_end(daemon: Served) -> None:
    """Created, seeds in, closed, finished: each seed has its outcome, and the API says so."""
    run = await daemon.new_run("first", labels={"team": "a"}, config={"recipe": {"target_words": 60}})
    assert (run["id"], run["state"], run["accepting"]) == ("first", "running", True)
    assert run["labels"] == {"team": "a"}
    assert run["last"] == {"contexts": None, "rejects": None, "samples": None}

    assert await daemon.submit("first", 6) == 6
    closed = await daemon.ask("POST", "/v1/runs/first/close")
    assert not closed["accepting"]
    await daemon.until_state("first", "finished")

    run = await daemon.ask("GET", "/v1/runs/first")
    assert run["state"] == "finished"
    counts = run["counts"]
    assert (counts["accepted"], counts["contexts"] + counts["rejects"], counts["waiting"]) == (6, 6, 0)
    assert counts["contexts"] == run["last"]["contexts"] + 1
    assert counts["samples"] == run["last"]["samples"] + 1
    assert run["tokens"]["completion"] > 0
    assert 0 <= run["prefix"]["achieved"] <= 1
    assert 0 <= run["prefix"]["planned"] <= 1


async def test_lines_of_the_log_name_their_run(daemon: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run logs has its id, not that of the request that created it."""
    await daemon.new_run("named")
    await daemon.submit("named", 1)
    await daemon.ask("POST", "/v1/runs/named/close")
    await daemon.until_state("named", "finished")
    started = [line for line in capsys.readouterr().err.splitlines() if "run.started" in line]
    assert len(started) == 1
    assert "run=named" in started[0]
    assert "request_id" not in started[0]


async def test_the_same_request_creates_one_run(daemon: Served) -> None:
    """The same body with the same id returns the run with 200; a different body is refused with 409."""
    body = {"id": "twice", "weight": 2.0}
    statuses = []
    for _ in range(2):
        async with daemon.session.post("/v1/runs", json=body) as answer:
            statuses.append(answer.status)
    assert statuses == [201, 200]

    problem = await daemon.refused("POST", "/v1/runs", {"id": "twice", "weight": 3.0})
    assert problem["status"] == 409
    assert "different request" in problem["detail"]


async def test_ids_are_made_for_those_who_choose_none(daemon: Served) -> None:
    """Two runs without an id are two runs."""
    one, other = await daemon.new_run(), await daemon.new_run()
    assert one["id"] != other["id"]


@pytest.mark.parametrize(
    "run_id", ["", "..", "../x", "a/b", "A", ".hidden", "a.", "-a", "a" * 65, "a\u0000", "ü", "a b"]
)
async def test_ids_stay_in_their_folder(daemon: Served, run_id: str) -> None:
    """What could leave ROOT, or be hidden in it, is not an id."""
    problem = await daemon.refused("POST", "/v1/runs", {"id": run_id})
    assert problem["status"] == 422
    assert "not a valid id" in problem["detail"]


async def test_runs_are_listed_newest_first_in_pages(daemon: Served) -> None:
    """`limit` and `after` page through all of them; `state` selects."""
    for name in "abcde":
        await daemon.new_run(name)
    await daemon.ask("POST", "/v1/runs/b/pause")

    pages: list[list[str]] = []
    after = ""
    while True:
        page = await daemon.ask("GET", f"/v1/runs?limit=2{after}")
        pages.append([run["id"] for run in page["data"]])
        if not page["has_more"]:
            break
        after = f"&after={pages[-1][-1]}"
    assert pages == [["e", "d"], ["c", "b"], ["a"]]
    paused = await daemon.ask("GET", "/v1/runs?state=paused")
    assert [run["id"] for run in paused["data"]] == ["b"]


async def test_a_run_that_is_deleted_twice_at_once_is_gone_once(daemon: Served) -> None:
    """The later request finds none, and leaves a new run of that id alone."""
    await daemon.new_run("gone")

    async def deleted() -> int:
        async with daemon.session.delete("/v1/runs/gone?force=true") as answer:
            return answer.status

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(deleted(), name=f"delete {n}") for n in range(3)]
    assert sorted(one.result() for one in asked) == [204, 404, 404]
    assert (await daemon.new_run("gone"))["state"] == "running"


async def test_pause_resume_and_drain(daemon: Served) -> None:
    """A paused run accepts seeds and begins none; a drained one refuses them; both go on."""
    await daemon.new_run("steered")
    await daemon.ask("POST", "/v1/runs/steered/pause")
    paused = await daemon.until_state("steered", "paused")
    assert paused["accepting"]
    await daemon.submit("steered", 4)

    drained = await daemon.ask("POST", "/v1/runs/steered/drain")
    assert (drained["state"], drained["accepting"]) == ("stopped", False)
    assert (await daemon.refused("POST", "/v1/runs/steered/pause"))["status"] == 409
    assert (await daemon.ask("GET", "/v1/runs/steered"))["counts"]["waiting"] == 4

    await daemon.ask("POST", "/v1/runs/steered/resume")
    await daemon.ask("POST", "/v1/runs/steered/close")
    done = await daemon.until_state("steered", "finished")
    assert done["counts"]["contexts"] + done["counts"]["rejects"] == 4


async def test_a_finished_run_is_reopened(daemon: Served) -> None:
    """`resume` has a finished run accept seeds again; the new ones get outcomes beside the old."""
    await daemon.new_run("again")
    for part in range(2):
        await daemon.submit("again", 3, first=3 * part)
        await daemon.ask("POST", "/v1/runs/again/close")
        done = await daemon.until_state("again", "finished")
        assert done["counts"]["contexts"] == 3 * (part + 1)
        await daemon.ask("POST", "/v1/runs/again/resume")


async def test_deletion(daemon: Served) -> None:
    """A run with work to do is deleted only by force; then its id is free, and its directory gone."""
    await daemon.new_run("short")
    await daemon.submit("short", 2)
    problem = await daemon.refused("DELETE", "/v1/runs/short")
    assert problem["status"] == 409
    assert "force=true" in problem["detail"]

    await daemon.ask("DELETE", "/v1/runs/short?force=true")
    assert (await daemon.refused("GET", "/v1/runs/short"))["status"] == 404
    assert list((daemon.daemon.root / "runs").iterdir()) == []
    await daemon.new_run("short")


async def test_runs_survive_a_restart(start_daemon: StartDaemon) -> None:
    """Running ones go on, paused and stopped ones stay so, finished ones are shown as they ended."""
    async with start_daemon() as served:
        for name in ("runs", "paused", "stopped", "done"):
            await served.new_run(name)
            await served.submit(name, 3)
        await served.ask("POST", "/v1/runs/paused/pause")
        await served.ask("POST", "/v1/runs/stopped/drain")
        await served.ask("POST", "/v1/runs/done/close")
        done = await served.until_state("done", "finished")
    async with start_daemon() as served:
        states = {run["id"]: run["state"] for run in (await served.ask("GET", "/v1/runs"))["data"]}
        assert states == {"runs": "running", "paused": "paused", "stopped": "stopped", "done": "finished"}
        again = await served.ask("GET", "/v1/runs/done")
        assert again == done | {"rates": again["rates"]}
        await served.ask("POST", "/v1/runs/runs/close")
        finished = await served.until_state("runs", "finished")
        assert finished["counts"]["contexts"] == 3


async def test_a_damaged_record_is_left_alone(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Its run is not listed, others are; nobody can take its directory by creating a run of the same name."""
    async with start_daemon() as served:
        await served.new_run("damaged")
        await served.submit("damaged", 2)
        await served.new_run("sound")
    record = tmp_path / "root" / "runs" / "damaged" / "service.json"
    await asyncio.to_thread(record.write_bytes, b"{")
    async with start_daemon() as served:
        assert [run["id"] for run in (await served.ask("GET", "/v1/runs"))["data"]] == ["sound"]
        for config in ({}, {"recipe": {"use": "nonsense"}}):
            problem = await served.refused("POST", "/v1/runs", {"id": "damaged", "config": config})
            assert problem["status"] == 409
        assert await asyncio.to_thread(record.read_bytes) == b"{"
        assert await asyncio.to_thread((record.parent / "spool" / "seeds.jsonl").exists)


async def test_a_failing_run_touches_no_other(daemon: Served) -> None:
    """A damaged log fails its run, with one line; others go on, and it goes on after a mend."""
    await daemon.new_run("broken")
    await daemon.new_run("sound")
    await daemon.submit("broken", 1)
    await daemon.until("broken", lambda run: run.rows["contexts"] == 1)
    await daemon.ask("POST", "/v1/runs/broken/pause")
    await daemon.until_state("broken", "paused")
    manifest = daemon.daemon.root / "runs" / "broken" / "manifest.jsonl"
    before = manifest.read_bytes()
    manifest.write_bytes(b'{"kind": 1}\n' + before)
    await daemon.ask("POST", "/v1/runs/broken/resume")
    broken = await daemon.until_state("broken", "failed")
    assert "manifest.jsonl:1" in broken["error"]
    assert not broken["accepting"]

    await daemon.submit("sound", 2)
    await daemon.ask("POST", "/v1/runs/sound/close")
    assert (await daemon.until_state("sound", "finished"))["counts"]["contexts"] == 2

    manifest.write_bytes(before)
    await daemon.ask("POST", "/v1/runs/broken/resume")
    await daemon.ask("POST", "/v1/runs/broken/close")
    assert (await daemon.until_state("broken", "finished"))["error"] is None


async def test_a_bug_in_a_run_fails_it_alone(daemon: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody expected is logged, and ends its run."""
    from streamsyn.daemon import hosted_run

    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(hosted_run, "run_in_loop", broken)
    await daemon.new_run("buggy")
    run = await daemon.until_state("buggy", "failed")
    assert "ZeroDivisionError" in run["error"]
    assert (await daemon.ask("GET", "/healthz")) == {"status": "ok"}


async def test_rejects_are_asked_again(daemon: Served) -> None:
    """`retry` asks the rejects of the given reasons again, and the run finishes again."""
    await daemon.new_run(
        "retried", config={"checks": {"min_words": 19_999}, "run": {"max_reject_fraction": 1.0}}
    )
    await daemon.submit("retried", 2)
    await daemon.ask("POST", "/v1/runs/retried/close")
    done = await daemon.until_state("retried", "finished")
    assert done["rejects"] == {"too_short": 2}
    asked = daemon.simulation.stats.requests

    problem = await daemon.refused("POST", "/v1/runs/retried/retry", {"reasons": ["to_short"]})
    assert problem["status"] == 422
    await daemon.ask("POST", "/v1/runs/retried/retry", {"reasons": ["too_short"]})
    done = await daemon.until_state("retried", "finished")
    assert daemon.simulation.stats.requests > asked
    assert (done["rejects"], done["counts"]["rejects"]) == ({"too_short": 2}, 2)
    assert done["last"]["rejects"] == 3


async def test_health_and_readiness(start_daemon: StartDaemon) -> None:
    """Alive and ready."""
    async with start_daemon() as served:
        assert await served.ask("GET", "/healthz") == {"status": "ok"}
        assert await served.ask("GET", "/readyz") == {"status": "ready"}


async def test_finished_runs_are_let_go_of(daemon: Served) -> None:
    """Of a run that has finished, and that nobody looks at, only a few words stay in memory."""
    for number in range(3):
        await daemon.new_run(f"run-{number}")
        await daemon.submit(f"run-{number}", 2)
        await daemon.ask("POST", f"/v1/runs/run-{number}/close")
        await daemon.until_state(f"run-{number}", "finished")
    runs = daemon.daemon.runs
    async with asyncio.timeout(5):
        while list(runs._known):
            gc.collect()
            await asyncio.sleep(0)
    assert runs.active == []
    assert len(runs) == 3
    assert (await daemon.ask("GET", "/v1/runs/run-0"))["counts"]["contexts"] == 2


@pytest.mark.parametrize("seed", range(3))
async def test_any_order_of_requests(start_daemon: StartDaemon, seed: int) -> None:
    """Whatever several clients ask at once, across a restart, each accepted seed gets one outcome."""
    rng = random.Random(seed)
    actions = ["pause", "resume", "drain", "retry", "close", "seeds", "seeds", "list"]
    sent = accepted = 0

    async def client(served: Served, steps: list[str]) -> None:
        nonlocal sent, accepted
        for action in steps:
            if action == "list":
                await served.ask("GET", "/v1/runs?limit=1")
            elif action == "seeds":
                first, sent = sent, sent + 3
                body = b"\n".join(seed_lines(3, first))
                async with served.session.post("/v1/runs/busy/seeds", data=body) as answer:
                    assert answer.status in {202, 409}
                    accepted += (await answer.json())["accepted"] if answer.status == 202 else 0
            else:
                async with served.session.post(f"/v1/runs/busy/{action}") as answer:
                    assert answer.status in {202, 409}, await answer.text()

    for life in range(2):
        async with start_daemon() as served:
            if life == 0:
                await served.new_run("busy")
            async with asyncio.TaskGroup() as group:
                for number in range(3):
                    steps = [rng.choice(actions) for _ in range(8)]
                    group.create_task(client(served, steps), name=f"client {number}")
            if life == 1:
                await served.ask("POST", "/v1/runs/busy/resume")
                await served.ask("POST", "/v1/runs/busy/close")
                run = await served.until_state("busy", "finished")
                outcomes = run["counts"]["contexts"] + run["counts"]["rejects"]
                assert (run["counts"]["accepted"], outcomes) == (accepted, accepted)
                assert sum(run["rejects"].values()) == run["counts"]["rejects"]


async def test_a_close_that_a_kill_has_interrupted_holds(start_daemon: StartDaemon) -> None:
    """The inbox is closed on disk, and the record does not say so yet."""
    async with start_daemon() as served:
        await served.new_run("r")
        await served.submit("r", 3)
        await served.ask("POST", "/v1/runs/r/pause")
        run = await served.until("r", lambda run: not run.is_executed)
        await asyncio.to_thread((await run.inbox()).close)
    async with start_daemon() as served:
        assert not (await served.ask("GET", "/v1/runs/r"))["accepting"]
        await served.ask("POST", "/v1/runs/r/resume")
        await served.until_state("r", "finished")
