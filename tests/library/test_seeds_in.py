"""Seeds that are not in files: iterables, and seeds that are submitted while a run goes on."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import streamsyn
from streamsyn.library import seed_feed
from tests.builders import rows
from tests.library.conftest import Server, arguments, pairs

Rows = list[dict[str, Any]]


async def in_a_loop(seeds: Rows) -> AsyncIterator[dict[str, Any]]:
    """An asynchronous iterable."""
    for seed in seeds:
        await asyncio.sleep(0)
        yield seed


@pytest.mark.parametrize("kind", [list, iter, in_a_loop])
async def test_seeds_of_an_iterable(tmp_path: Path, server: Server, kind: Callable[[Rows], Any]) -> None:
    """They are spooled, in their order; seeds that come twice are skipped."""
    seeds = [*pairs(40), *pairs(3)]
    async with streamsyn.open_run(seeds=kind(seeds), **arguments(tmp_path / "out", server)) as run:
        found = [sample["seed_id"] async for sample in run]
    assert {seed["id"] for seed in seeds} == set(found)
    assert len(server.asked) == len(found) == 40
    submitted = run.status().submitted
    assert (40, 3, 0) == (submitted.accepted, submitted.duplicate, submitted.refused_total)


@pytest.mark.parametrize("kind", [iter, in_a_loop])
async def test_a_seed_is_worked_on_before_the_next_one_comes(
    tmp_path: Path, server: Server, kind: Callable[[Any], Any]
) -> None:
    """An iterable may wait for the sample of the seed before."""
    arrived = threading.Event()
    overrides = {"assembly.contexts_per_sample": 1}

    def one_by_one() -> Iterator[dict[str, Any]]:
        for pair in pairs(3):
            yield pair
            assert arrived.wait(10)
            arrived.clear()

    async def one_by_one_in_a_loop(_: Any) -> AsyncIterator[dict[str, Any]]:
        for pair in pairs(3):
            yield pair
            await asyncio.to_thread(arrived.wait, 10)
            arrived.clear()

    seeds: Any = one_by_one() if kind is iter else one_by_one_in_a_loop(None)
    given = arguments(tmp_path / "out", server, overrides=overrides)
    async with streamsyn.open_run(seeds=seeds, **given) as run:
        async for sample in run:
            assert sample["seed_id"] == f"s{sample['seq']}"
            arrived.set()
    assert run.summary.samples == 3


async def test_what_was_taken_from_an_iterable_survives_leaving(tmp_path: Path, server: Server) -> None:
    """The run goes on without it, and the same iterable again changes nothing."""
    out = tmp_path / "out"
    async with streamsyn.open_run(seeds=iter(pairs(100)), buffer=1, **arguments(out, server)) as run:
        async for _ in run:
            break
    spooled = run.status().submitted.accepted
    assert spooled > run.summary.contexts
    summary = await asyncio.to_thread(streamsyn.run_sync, **arguments(out, server))
    assert (summary.contexts, summary.samples) == (spooled, spooled)
    async with streamsyn.open_run(seeds=pairs(100), **arguments(out, server)) as run:
        assert len([sample async for sample in run]) == 100
    assert run.status().submitted.duplicate == spooled
    assert len(server.asked) == 100


async def test_an_endless_iterable_is_read_as_the_run_goes_on(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bounded number of seeds ahead of it."""
    monkeypatch.setattr(seed_feed, "_MAX_UNREAD", 8)
    far_ahead = threading.Event()

    def endless() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            if number > 1500:
                far_ahead.set()
            yield from pairs(1, number)

    async with streamsyn.open_run(seeds=endless(), buffer=1, **arguments(tmp_path / "out", server)) as run:
        async for sample in run:
            if sample["seq"] == 5:
                assert not await asyncio.to_thread(far_ahead.wait, 0.5)
                break
    assert run.status().state == "stopped"


@pytest.mark.parametrize("kind", [iter, in_a_loop])
async def test_the_error_of_an_iterable_is_raised_once_its_seeds_are_finished(
    tmp_path: Path, server: Server, kind: Callable[[Any], Any]
) -> None:
    """As it is: it is the user's."""
    out, found = tmp_path / "out", []

    def failing() -> Iterator[dict[str, Any]]:
        yield from pairs(9)
        raise ZeroDivisionError

    async def failing_in_a_loop() -> AsyncIterator[dict[str, Any]]:
        for pair in failing():
            yield pair

    seeds: Any = failing() if kind is iter else failing_in_a_loop()

    async def block() -> None:
        async with streamsyn.open_run(seeds=seeds, **arguments(out, server)) as run:
            async for sample in run:
                found.append(sample)  # noqa: PERF401 - they come before the error

    with pytest.raises(ZeroDivisionError):
        await block()
    assert len(found) == len(await asyncio.to_thread(rows, out, "samples"))
    async with streamsyn.open_run(seeds=[], **arguments(out, server)) as run:
        assert {pair["id"] for pair in pairs(9)} >= {sample["seed_id"] async for sample in run}


async def test_what_is_not_a_seed_becomes_a_reject(tmp_path: Path, server: Server) -> None:
    """With its place in the spool; the run goes on."""
    seeds: Any = [pairs(1)[0], {"instruction": "no answer"}, "not a dict", *pairs(3, 1)]
    async with streamsyn.open_run(seeds=seeds, **arguments(tmp_path / "out", server)) as run:
        outcomes = [outcome async for outcome in run.outcomes()]
    rejects = {row["origin"]: row["reason"] for row in outcomes if "reason" in row}
    assert rejects == {"submitted:2": "not_a_seed", "submitted:3": "invalid_json"}
    assert run.summary.contexts == 4


async def test_an_iterable_takes_the_place_of_the_sources(tmp_path: Path, server: Server) -> None:
    """As paths do."""
    config = {"seeds": {"sources": [{"path": "missing.jsonl"}]}}
    async with streamsyn.open_run(config, seeds=pairs(3), **arguments(tmp_path / "out", server)) as run:
        assert len([sample async for sample in run]) == 3


async def test_seeds_are_submitted_while_the_run_goes_on(tmp_path: Path, server: Server) -> None:
    """Until they are closed; what is not a seed is refused, and counted."""
    overrides = {"assembly.contexts_per_sample": 1}
    async with streamsyn.open_run(**arguments(tmp_path / "out", server, overrides=overrides)) as run:
        submitted = await run.submit(pairs(2))
        assert (2, 0, 0) == (submitted.accepted, submitted.duplicate, submitted.refused_total)
        found = [await anext(run), await anext(run)]
        submitted = await run.submit(in_a_loop([*pairs(4), {"instruction": "no answer"}]))
        assert (2, 2, 1) == (submitted.accepted, submitted.duplicate, submitted.refused_total)
        assert submitted.refused[0].line == 5
        assert "answer" in submitted.refused[0].detail
        assert (await run.submit(pairs(1, 4)[0])).accepted == 1
        await run.close_seeds()
        found += [sample async for sample in run]
        with pytest.raises(streamsyn.InboxClosed):
            await run.submit(pairs(1, 5))
        assert run.status().submitted.accepted == 5
    assert {sample["seed_id"] for sample in found} == {f"s{number}" for number in range(5)}
    assert run.status().state == "finished"
    await run.close_seeds()  # there is nothing left to close


async def test_text_is_one_seed_and_bytes_are_not_seeds(tmp_path: Path, server: Server) -> None:
    """Not one per character."""
    line: Any = b'{"instruction": "Who?", "answer": "A keeper."}'
    async with streamsyn.open_run(**arguments(tmp_path / "out", server)) as run:
        assert (await run.submit(line)).accepted == 1
        assert (await run.submit(line.decode())).duplicate == 1
        await run.close_seeds()
        await run.wait()
    with pytest.raises(streamsyn.ConfigError, match="an iterable of dicts, not bytes"):
        async with streamsyn.open_run(seeds=line, **arguments(tmp_path / "other", server)):
            pass


async def test_a_run_with_seeds_can_be_kept_open(tmp_path: Path, server: Server) -> None:
    """A loop that submits what follows from a sample; without `keep_open`, submitting is refused."""
    out = tmp_path / "out"
    overrides = {"assembly.contexts_per_sample": 1}
    async with streamsyn.open_run(
        seeds=pairs(3), keep_open=True, **arguments(out, server, overrides=overrides)
    ) as run:
        async for sample in run:
            if sample["seq"] < 3:
                await run.submit(pairs(1, 3 + sample["seq"]))
            if sample["seq"] == 5:
                await run.close_seeds()
    assert run.summary.samples == 6
    path = tmp_path / "seeds.jsonl"
    await asyncio.to_thread(path.write_text, '{"instruction": "Who?", "answer": "A keeper."}')
    async with streamsyn.open_run(seeds=path, **arguments(out, server, overrides=overrides)) as run:
        with pytest.raises(streamsyn.InboxClosed, match=r"keep_open=True"):
            await run.submit(pairs(1, 9))
        assert len([sample async for sample in run]) == 7


async def test_a_closed_run_can_be_opened_again(tmp_path: Path, server: Server) -> None:
    """It has finished; then it gets more seeds."""
    given = arguments(tmp_path / "out", server, overrides={"assembly.contexts_per_sample": 1})
    for number in range(3):
        after = number - 1 if number else None
        async with streamsyn.open_run(**given, after=after, keep_open=True) as run:
            await run.submit(pairs(1, number))
            await run.close_seeds()
            assert [sample["seed_id"] async for sample in run] == [f"s{number}"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("config", [None, {}])
async def test_a_run_that_is_opened_again_without_seeds_finishes_what_it_holds(
    tmp_path: Path, server: Server, config: dict[str, Any] | None
) -> None:
    """It does not wait for more, although nobody ever closed it; unless it is kept open."""
    given = arguments(tmp_path / "out", server, overrides={"assembly.contexts_per_sample": 1})
    async with streamsyn.open_run(config, buffer=1, **given) as run:
        await run.submit(pairs(20))
        await anext(run)
    assert run.status().state == "stopped"
    async with asyncio.timeout(10), streamsyn.open_run(config, **given) as run:
        assert len([sample async for sample in run]) == 20
        with pytest.raises(streamsyn.InboxClosed, match=r"keep_open=True"):
            await run.submit(pairs(1, 20))
    assert run.status().state == "finished"


def test_run_sync_takes_the_same_seeds(tmp_path: Path, server: Server, seeds: Callable[[int], Path]) -> None:
    """Paths, iterables and asynchronous iterables; its summary is that of the command."""
    for given in (seeds(20), [seeds(20)], pairs(20), iter(pairs(20)), in_a_loop(pairs(20))):
        out = tmp_path / f"out-{len(server.asked)}"
        summary = streamsyn.run_sync(seeds=given, **arguments(out, server))
        assert (20, 0, 20, None) == (summary.contexts, summary.rejects, summary.samples, summary.stopped)
    assert len(server.asked) == 100
