"""The rules of SGLang's scheduler, one by one."""

import dataclasses

import pytest

from streamsyn.simulator.costs import H100
from streamsyn.simulator.engine import Work
from streamsyn.simulator.scheduler import (
    DECAY,
    INITIAL,
    Admission,
    KVPool,
    NewTokenRatio,
    Retractions,
    RunningBatch,
    WaitingQueue,
)


def work(tokens: int, max_new_tokens: int, written: int = 0) -> Work:
    return Work(
        "r", list(range(tokens)), target=max_new_tokens, max_new_tokens=max_new_tokens, written=written
    )


def admission(pool_tokens: int, chunk: int = 100_000) -> tuple[Admission, WaitingQueue]:
    """Admission to an empty server without a cache."""
    model = dataclasses.replace(
        H100, pool_tokens=pool_tokens, chunked_prefill_size=chunk, max_prefill_tokens=100_000
    )
    waiting = WaitingQueue("fcfs")
    return Admission(model, KVPool(pool_tokens, caching=False), waiting, RunningBatch()), waiting


def admitted(pool_tokens: int, works: list[Work]) -> int:
    """How many of `works` an empty server admits to its first batch."""
    admits, waiting = admission(pool_tokens)
    for each in works:
        waiting.add(each)
    admits.begin(0.0, 0)
    return len(admits.parts)


def test_new_tokens_are_reserved_up_to_a_limit() -> None:
    """Beyond 4,096 new tokens the reserve is clipped; it shrinks once fewer are left."""
    batch = RunningBatch()
    batch.join(work(10, 6000, written=1))
    batch.join(work(10, 1000, written=1))
    reserves = [batch.reserve]
    for steps in (900, 3000):
        batch.steps += steps
        reserves.append(batch.reserve - (999 - batch.steps))
    assert reserves == [4096 + 999, 4096, 2099]


def test_a_request_needs_room_for_its_prompt_and_new_tokens() -> None:
    """100 tokens of prompt, 400 new ones and one page: strictly less than what is free."""
    assert [admitted(size, [work(100, 400), work(100, 400)]) for size in (1002, 1003)] == [1, 2]


def test_a_retracted_request_sets_aside_all_its_new_tokens_for_the_rest_of_its_batch() -> None:
    """It is admitted by the new tokens that are left; the next one sees the whole reserve."""
    works = [work(100, 400, written=300), work(100, 400)]
    assert [admitted(size, works) for size in (502, 1302, 1303)] == [1, 1, 2]


def test_the_last_chunk_of_a_prompt_sets_aside_its_new_tokens() -> None:
    """The request behind a chunked prompt is not admitted into the room for its answer."""
    for size, parts in ((1102, 1), (1103, 2)):
        admits, waiting = admission(size, chunk=150)
        waiting.add(work(200, 400))
        admits.begin(0.0, 0)
        admits.end(starting=True)
        waiting.add(work(100, 400))
        admits.begin(1.0, 0)
        assert len(admits.parts) == parts


def test_the_ratio_decays_with_steps_and_rises_by_a_retraction() -> None:
    """The step of a retraction does not lower it; an idle server starts again."""
    ratio = NewTokenRatio()
    assert ratio.at(10) == pytest.approx(INITIAL - 10 * DECAY)
    assert ratio.at(10_000) == pytest.approx(0.098)
    ratio.retracted(10_000, [work(1, 1000, written=480), work(1, 1000, written=480)])
    assert [ratio.at(step) for step in (10_000, 10_001)] == [pytest.approx(1000 / 2001)] * 2
    assert ratio.at(10_002) == pytest.approx(1000 / 2001 - DECAY)
    ratio.reset(10_002)
    assert ratio.at(10_002) == INITIAL


def test_retractions_are_reported_late_and_once() -> None:
    """By the next prefill batch or the next 40th step, until the one after it."""
    told = Retractions()
    told.retracted(30, 5)
    assert [told.at(steps) for steps in (30, 39, 40, 79, 80, 500)] == [0, 0, 5, 5, 0, 0]
    told.prefilled(35)
    assert [told.at(steps) for steps in (35, 39, 40)] == [5, 5, 0]
    told.retracted(38, 2)
    assert [told.at(steps) for steps in (38, 40, 80)] == [5, 2, 0]
    told.prefilled(39)
    told.prefilled(39)
    assert told.at(39) == 0
