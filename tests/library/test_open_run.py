"""`open_run` against a simulated server over loopback: samples as they are written, leaving, resuming."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamsyn
from streamsyn.library.written_rows import Written
from streamsyn.simulator.settings import Fault
from streamsyn.sink.shards import KINDS
from tests.builders import rows
from tests.library.conftest import Server, arguments, pairs, serving

SeedFile = Callable[[int], Path]


def seqs(found: list[dict[str, Any]]) -> list[int]:
    return [row["seq"] for row in found]


async def test_a_run_hands_out_every_sample_in_order(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """They are the rows of the directory, and were there before they were handed out."""
    out, found = tmp_path / "out", []
    async with streamsyn.open_run(seeds=seeds(40), **arguments(out, server)) as run:
        async for sample in run:
            found.append(sample)
            assert run.status().samples > sample["seq"]
        assert run.status().state == "finished"
    assert found == await asyncio.to_thread(rows, out, "samples")
    assert seqs(found) == list(range(40))
    summary = run.summary
    assert (40, 0, 40, None) == (summary.contexts, summary.rejects, summary.samples, summary.stopped)


async def test_a_run_that_is_left_early_is_resumed_without_loss(
    tmp_path: Path, server: Server, seeds: SeedFile
) -> None:
    """Nothing is asked twice: what was in flight is finished first."""
    out, path = tmp_path / "out", seeds(200)
    async with streamsyn.open_run(seeds=path, buffer=1, **arguments(out, server)) as run:
        async for sample in run:
            if sample["seq"] == 3:
                break
    assert run.status().state == "stopped"
    assert run.summary.contexts < 200
    async with streamsyn.open_run(seeds=path, after=3, **arguments(out, server)) as run:
        rest = [sample async for sample in run]
    assert seqs(rest) == list(range(4, 200))
    assert len(set(server.asked)) == len(server.asked) == 200


async def test_a_directory_is_resumed_with_its_own_configuration(
    tmp_path: Path, server: Server, seeds: SeedFile
) -> None:
    """Without arguments; the iteration begins with the samples of the earlier run."""
    out = tmp_path / "out"
    async with streamsyn.open_run(seeds=seeds(30), buffer=1, **arguments(out, server)) as run:
        async for _ in run:
            break
    async with streamsyn.open_run(out=out, preflight=False) as run:
        assert seqs([sample async for sample in run]) == list(range(30))


async def test_not_asking_for_samples_slows_the_producer(
    tmp_path: Path, server: Server, seeds: SeedFile
) -> None:
    """However long the reader takes, servers are asked a few seeds ahead, and not more."""
    given = arguments(tmp_path / "out", server)
    async with streamsyn.open_run(seeds=seeds(200), buffer=2, **given) as run:
        async for sample in run:
            await asyncio.to_thread(server.until_asked, min(200, sample["seq"] + 12))
            if sample["seq"] == 5:
                assert not await asyncio.to_thread(server.is_asked, 5 + 60, 0.5)
    assert len(server.asked) == 200


async def test_waiting_for_the_end_lifts_the_backpressure(
    tmp_path: Path, server: Server, seeds: SeedFile
) -> None:
    """Whoever waits asks for no sample, and would wait for ever."""
    async with streamsyn.open_run(seeds=seeds(100), buffer=1, **arguments(tmp_path / "out", server)) as run:
        summary = await run.wait()
        assert summary.samples == 100
        assert seqs([sample async for sample in run]) == list(range(100))


async def test_a_drained_run_hands_out_what_it_wrote(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """It has stopped as it was asked to: that is not an error."""
    async with streamsyn.open_run(seeds=seeds(300), buffer=1, **arguments(tmp_path / "out", server)) as run:
        found = []
        async for sample in run:
            found.append(sample)
            if len(found) == 5:
                run.drain()
        assert run.status().state == "stopped"
        summary = await run.drain()
    assert 5 <= len(found) == summary.samples < 300
    assert summary.stopped == "drained"


async def test_outcomes_are_contexts_and_rejects(tmp_path: Path, server: Server) -> None:
    """Each in the order of its log; also where no samples are made."""
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"instruction": "Who?", "answer": "A keeper."}\n{"instruction": "no answer"}\n' * 2)
    given = arguments(tmp_path / "out", server, overrides={"assembly.write": False})
    async with streamsyn.open_run(seeds=path, **given) as run:
        with pytest.raises(streamsyn.ConfigError, match=r"assembly.write = false makes no samples"):
            aiter(run)
        outcomes = run.outcomes()
        found = [await anext(outcomes) for _ in range(3)]
        with pytest.raises(streamsyn.TooManyRejects, match=r"more than run.max_reject_fraction = 50.0%"):
            await anext(outcomes)
    assert [outcome["origin"] for outcome in found if "reason" in outcome] == [f"{path}:2", f"{path}:4"]
    assert [outcome["instruction"] for outcome in found if "context" in outcome] == ["Who?"]


async def test_code_that_blocks_delays_no_request(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """The event loop of the caller stands still until the server has been asked for every seed."""
    overrides = {"run.queue_size": 256, "sink.sync_rows": 256}
    async with streamsyn.open_run(
        seeds=seeds(100), **arguments(tmp_path / "out", server, overrides=overrides)
    ) as run:
        async for _ in run:
            server.until_asked(100)
            break


async def test_an_error_in_the_block_is_raised_as_it_is(
    tmp_path: Path, server: Server, seeds: SeedFile
) -> None:
    """Also where the seeds are fed by an asyncio task; the run has ended, and can be resumed."""

    async def source() -> Any:
        for pair in pairs(300):
            yield pair

    async def block(given: Any) -> None:
        async with streamsyn.open_run(seeds=given, buffer=1, **arguments(out, server)) as run:
            runs.append(run)
            async for sample in run:
                sample["seq"] / 0

    runs: list[streamsyn.Run] = []
    for given in (seeds(300), source()):
        out = tmp_path / f"out-{type(given).__name__}"
        with pytest.raises(ZeroDivisionError):
            await block(given)
        assert runs.pop().status().state == "stopped"
    async with streamsyn.open_run(seeds=seeds(300), **arguments(out, server)) as run:
        assert len([sample async for sample in run]) == 300


async def test_a_timeout_around_the_iteration_loses_no_sample(tmp_path: Path, seeds: SeedFile) -> None:
    """It cancels the wait for a sample; the next iteration goes on with that sample."""
    with serving(latency_ms=30) as server:
        found: list[dict[str, Any]] = []
        timeouts = 0
        async with streamsyn.open_run(seeds=seeds(40), **arguments(tmp_path / "out", server)) as run:
            while len(found) < 40:
                try:
                    async with asyncio.timeout(0.01):
                        while len(found) < 40:
                            found.append(await anext(run))
                except TimeoutError:
                    timeouts += 1
    assert timeouts > 1
    assert seqs(found) == list(range(40))


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_cancellation_stops_a_drain_at_once(tmp_path: Path, seeds: SeedFile, leaves: bool) -> None:
    """The drain would take minutes here: after a first cancellation, or after leaving the block."""
    runs: list[streamsyn.Run] = []

    async def block() -> None:
        given = arguments(tmp_path / "out", server, overrides={"run.drain_timeout_s": 600})
        async with streamsyn.open_run(seeds=seeds(9), **given) as run:
            runs.append(run)
            await asyncio.to_thread(server.until_asked, 1)
            if not leaves:
                await run.wait()

    with serving(latency_ms=100_000) as server:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(block(), name="block")
            await asyncio.to_thread(server.until_asked, 1)
            if not leaves:
                task.cancel()
            while runs[0].status().state == "running":
                await asyncio.to_thread(server.until_asked, 1)  # lets the block go on
            assert not task.done()
            task.cancel()
    assert task.cancelled()
    assert runs[0].summary.stopped == "the block was left"
    assert (0, "stopped") == (runs[0].summary.contexts, runs[0].status().state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overrides": {"recipe.target_wrods": 9}}, "recipe.target_wrods.*recipe.target_words"),
        ({"seeds": "missing.jsonl"}, "missing.jsonl"),
        ({"seeds": {"instruction": "Who?", "answer": "A keeper."}}, "iterable of dicts, not dict"),
        ({"config": {"recipe": {"use": "nothing"}}}, "recipe.use"),
        ({"config": "missing.toml"}, "cannot read the configuration missing.toml"),
        ({"servers": []}, "no server: pass"),
        ({"buffer": 0}, "buffer must be at least 1"),
        ({"after": -2}, "after=-2: expected the seq"),
        ({"after": "2"}, "after='2': expected the seq"),
    ],
)
async def test_a_mistake_is_one_clear_error_before_the_block(
    tmp_path: Path, server: Server, given: dict[str, Any], message: str
) -> None:
    """The directory is not made."""
    given = {"seeds": pairs(2), **arguments(tmp_path / "out", server)} | given
    with pytest.raises(streamsyn.ConfigError, match=message):
        async with streamsyn.open_run(**given):
            raise AssertionError("the block was entered")
    assert not await asyncio.to_thread((tmp_path / "out").exists)


async def test_a_fleet_that_is_gone_is_raised_and_can_be_resumed(tmp_path: Path, seeds: SeedFile) -> None:
    """By the iteration, by `wait`, and at the end only if nobody was told."""
    with serving() as server:
        gone = arguments(tmp_path / "out", server, overrides={"fleet.give_up_s": 0.1})
    with pytest.raises(streamsyn.StoppedEarly, match=r"no healthy server.*can be resumed"):
        async with streamsyn.open_run(seeds=seeds(4), **gone) as run:
            await asyncio.to_thread(run._run._thread.join)
    async with streamsyn.open_run(seeds=seeds(4), **gone) as run:
        for wait in (lambda: anext(aiter(run)), run.wait):
            with pytest.raises(streamsyn.StoppedEarly):
                await wait()
    with serving() as server:
        async with streamsyn.open_run(seeds=seeds(4), **arguments(tmp_path / "out", server)) as run:
            assert len([sample async for sample in run]) == 4


async def test_first_outcomes_that_all_fail_are_an_error(tmp_path: Path, seeds: SeedFile) -> None:
    """Of its own kind: it does not help to run again."""
    with serving(lambda *_: Fault.REFUSE) as server:
        given = arguments(tmp_path / "out", server)
        async with streamsyn.open_run(seeds=seeds(100), **given) as run:
            with pytest.raises(streamsyn.TooManyRejects):
                await anext(run)


async def test_two_runs_at_once(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """In one process and one event loop; but not into one directory."""
    path = seeds(30)
    first, second = (arguments(tmp_path / name, server) for name in ("first", "second"))
    async with (
        streamsyn.open_run(seeds=path, **first) as one,
        streamsyn.open_run(seeds=path, **second) as other,
    ):
        with pytest.raises(streamsyn.DirectoryInUse, match="first is in use"):
            async with streamsyn.open_run(seeds=path, **first):
                raise AssertionError("the block was entered")
        async for sample in one:
            assert (await anext(other))["seq"] == sample["seq"]
        assert [] == [sample async for sample in other]


async def test_several_readers_share_the_samples(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """Each sample goes to one of them."""
    found: list[dict[str, Any]] = []
    async with streamsyn.open_run(seeds=seeds(60), buffer=2, **arguments(tmp_path / "out", server)) as run:

        async def read() -> None:
            found.extend([sample async for sample in run])

        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(read(), name=f"reader-{number}")
    assert sorted(seqs(found)) == list(range(60))


async def test_a_loop_that_stands_still_gathers_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are written meanwhile, one call wakes it; none is missed."""
    calls: list[Callable[[], None]] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", calls.append)
    written = Written(KINDS)
    for number in range(1000):
        written.rows("samples", number)
    (wake,) = calls
    wake()
    written.rows("samples", 1000)
    written.end()
    assert (2, 1000, False) == (len(calls), written["samples"], written.ended)
    calls[-1]()
    assert written.ended
