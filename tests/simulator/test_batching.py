"""Continuous batching as a state machine, with the time passed in."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.simulator.batching import Batching
from streamsyn.simulator.costs import CostModel
from streamsyn.simulator.engine import DuplicateRid, QueueFull, Work

MODEL = CostModel(
    name="test",
    prefill_s=1.0,
    prompt_token_s=0.01,
    cached_token_s=0.0,
    attention_s=0.0,
    padded_attention_s=0.0,
    step_s=0.1,
    request_step_s=0.01,
    kv_token_step_s=0.0,
    pool_tokens=4096,
    max_running_requests=8,
    max_prefill_tokens=1024,
    chunked_prefill_size=512,
)


def work(rid: str, tokens: int = 100, target: int = 10, text: str = "", **options: Any) -> Work:
    """A request with a prompt of its own (or one that begins with `text`)."""
    prompt = (text + f"{rid:>8}" * tokens)[: 4 * tokens]
    fields: dict[str, Any] = {
        "max_new_tokens": target,
        "output": f"{rid:>4}" * target,
        "target": target,
        **options,
    }
    return Work(rid, prompt, **fields)


def finish(machine: Batching, until: float = math.inf) -> list[tuple[float, str]]:
    """Lets everything happen; when each request was over."""
    ends = []
    while (now := machine.next_event_at()) <= until and now < math.inf:
        ends += [(round(now, 6), each.rid) for each in machine.advance(now) if each.over]
    return ends


def test_prefill_then_steps() -> None:
    """One request: its prefill with the first token, then one step per token."""
    machine = Batching(MODEL)
    machine.enter(work("a"), 5.0)
    assert machine.next_event_at() == 5.0
    assert finish(machine) == [(5 + 1 + 1.0 + 9 * 0.11, "a")]
    assert machine.next_event_at() == math.inf
    assert machine.generated == 10


def test_simultaneous_requests_share_a_prefill() -> None:
    """Two at the same time: one fixed cost of prefill, and steps that cost for two."""
    machine = Batching(MODEL)
    for rid in "ab":
        machine.enter(work(rid), 0.0)
    assert finish(machine) == [(1 + 2.0 + 9 * 0.12, "a"), (1 + 2.0 + 9 * 0.12, "b")]


def test_an_arrival_interrupts_at_the_next_step_and_decode_pauses() -> None:
    """The new request's prefill begins when the current step ends; the other request waits for it."""
    machine = Batching(MODEL)
    machine.enter(work("a"), 0.0)
    machine.advance(2.0)
    machine.enter(work("b"), 2.0 + 0.11 * 2.5)
    begins = 2.0 + 0.11 * 3
    assert machine.next_event_at() == pytest.approx(begins)
    ends = begins + 2.0 + 6 * 0.12
    assert finish(machine) == [(round(ends, 6), "a"), (round(ends + 3 * 0.11, 6), "b")]


def test_a_long_prompt_is_computed_in_chunks() -> None:
    """1,200 tokens in batches of 512; the rest of the last batch goes to waiting requests."""
    machine = Batching(MODEL)
    machine.enter(work("long", tokens=1200), 0.0)
    machine.enter(work("short", tokens=100), 0.0)
    first = 3 * 1.0 + 12.0 + 1.0
    assert machine.advance(first - 0.01) == []
    assert machine.running == 2
    assert [rid for _, rid in finish(machine)] == ["long", "short"]


def test_running_and_waiting_requests_are_limited() -> None:
    """Other requests wait in order; a full queue refuses."""
    model = dataclasses.replace(MODEL, max_running_requests=2)
    machine = Batching(model, queue_limit=2)
    machine.enter(work("a"), 0.0)
    machine.enter(work("b"), 0.0)
    with pytest.raises(QueueFull):
        machine.enter(work("c"), 0.0)
    machine.advance(0.0)
    machine.enter(work("c"), 0.0)
    machine.enter(work("d"), 0.0)
    with pytest.raises(DuplicateRid):
        machine.enter(work("a"), 0.0)
    assert (machine.running, len(machine.waiting)) == (2, 2)
    told = machine.load(0.0)  # like the real server, without the requests of the current prefill batch
    assert (told.running, told.waiting, told.waiting_tokens, told.used_tokens) == (0, 2, 200, 200)
    machine.advance(3.0)
    assert machine.load(3.0).running == 2
    assert [rid for _, rid in finish(machine)] == ["a", "b", "c", "d"]


def test_a_prompt_that_was_computed_is_found_again() -> None:
    """Whole blocks of the prompt and the answer come from the cache; scoring reuses less."""
    machine = Batching(MODEL)
    first = work("a", tokens=200, target=120)
    assert isinstance(first.prompt, str)
    machine.enter(first, 0.0)
    finish(machine)
    again = [
        Work("same", first.prompt, target=1),
        Work("on", first.prompt + first.output, target=1),
        Work("scored", first.prompt, reuse_limit=70, target=0),
    ]
    for each in again:
        machine.enter(each, 1e3)
    finish(machine)
    assert [each.cached_tokens for each in again] == [192, 256, 64]


def test_without_caching_nothing_is_found_again() -> None:
    """With cache_tokens = 0 nothing is cached."""
    machine = Batching(MODEL, caching=False)
    for now in (0.0, 1e3):
        each = work("a")
        machine.enter(each, now)
        finish(machine)
        machine.leave(each, now + 500)
        assert each.cached_tokens == 0
    assert (machine.pool.used, machine.pool.free) == (0, MODEL.pool_tokens)


def test_room_is_made_by_eviction() -> None:
    """When the pool is full, unused prefixes are evicted, least recently used first."""
    machine = Batching(MODEL)
    for number in range(30):
        machine.enter(work(f"{number}", tokens=640), 1e4 * number)
        finish(machine)
    assert machine.pool.cache.blocks * 64 > MODEL.pool_tokens - 800
    assert machine.pool.used == 0
    latest = work("29", tokens=640)
    latest.rid = "again"
    machine.enter(latest, 1e6)
    finish(machine)
    assert latest.cached_tokens == 576


def test_when_decode_runs_out_of_room_the_least_written_goes_back() -> None:
    """The request with fewer tokens is retracted, waits for the other one, and ends with all its text."""
    machine = Batching(dataclasses.replace(MODEL, pool_tokens=1050), caching=False)
    first, second = work("a", target=600), work("b", target=300)
    machine.enter(first, 0.0)
    machine.advance(2.0 + 300 * 0.11)
    machine.enter(second, 2.0 + 300 * 0.11)
    assert [rid for _, rid in finish(machine)] == ["a", "b"]
    assert (first.retractions, second.retractions, machine.retracted) == (0, 1, 1)
    assert (first.written, second.written) == (600, 300)


def test_retraction_by_optimism() -> None:
    """Reservations shrink with every step; too many are admitted, some are retracted, all end."""
    model = dataclasses.replace(MODEL, pool_tokens=3000, max_running_requests=64, prefill_s=0.0)
    machine = Batching(model)
    works = [work(f"{number:02d}", tokens=64, target=400) for number in range(40)]
    seen = 0
    for each in works:
        machine.enter(each, 0.0)
    while (now := machine.next_event_at()) < math.inf:
        machine.advance(now)
        told = machine.load(now)
        seen = max(seen, told.retracted)
    assert machine.retracted == sum(each.retractions for each in works) > 0
    assert seen > 0
    assert all(each.written == 400 for each in works)


def test_lpm_takes_the_longest_held_prefix_first() -> None:
    """Requests with a cached prefix go first; of several with the same uncached prefix, one leads."""
    model = dataclasses.replace(MODEL, max_running_requests=1)
    warm, cold = "warm" * 200, "cold" * 200
    for policy, order in (("fcfs", ["x", "c1", "c2", "w"]), ("lpm", ["x", "w", "c1", "c2"])):
        machine = Batching(model, policy=policy)
        machine.enter(work("0", tokens=200, text=warm, target=1), 0.0)
        finish(machine)
        for rid, text in (("x", ""), ("c1", cold), ("c2", cold), ("w", warm)):
            machine.enter(work(rid, tokens=200, text=text, target=3), 100.0)
            if rid == "x":
                machine.advance(100.0)
        assert [rid for _, rid in finish(machine)] == order


def test_lpm_gives_up_with_more_than_128_waiting() -> None:
    """As in the real scheduler, a longer queue is not sorted."""
    model = dataclasses.replace(MODEL, max_running_requests=1)
    machine = Batching(model, policy="lpm")
    machine.enter(work("0", tokens=200, text="w" * 800, target=1), 0.0)
    finish(machine)
    for number in range(130):
        machine.enter(work(f"c{number}", target=2), 100.0)
    machine.enter(work("w", tokens=200, text="w" * 800, target=2), 100.0)
    ends = [rid for _, rid in finish(machine)]
    assert ends[:2] == ["c0", "c1"]
    assert 2 < ends.index("w") <= 5


def test_an_abort_ends_at_the_next_step_with_what_is_written() -> None:
    """Waiting requests end at once, running ones at the step boundary, which frees their room."""
    machine = Batching(dataclasses.replace(MODEL, max_running_requests=1))
    runs, waits = work("a", target=100), work("b")
    machine.enter(runs, 0.0)
    machine.advance(0.0)
    machine.enter(waits, 0.0)
    machine.abort(waits, 1.0)
    assert machine.woken() == [waits]
    assert not waits.running
    machine.abort(runs, 2.0 + 0.11 * 4.5)
    assert machine.advance(2.0 + 0.11 * 5.01) == [runs]
    assert (runs.over, runs.written, machine.running, machine.pool.used) == (True, 6, 0, 0)


def test_a_stalled_request_holds_its_place() -> None:
    """A stalled request generates nothing and costs no step; an abort ends it at once."""
    machine = Batching(dataclasses.replace(MODEL, max_running_requests=1))
    stalled, waits = work("a", stalls=True), work("b")
    machine.enter(stalled, 0.0)
    machine.advance(0.0)
    machine.enter(waits, 0.0)
    assert finish(machine) == []
    assert (machine.running, len(machine.waiting), machine.next_event_at()) == (1, 1, math.inf)
    machine.abort(stalled, 50.0)
    assert stalled.over
    assert [rid for _, rid in finish(machine)] == ["a", "b"]


def test_a_stream_wakes_at_every_piece() -> None:
    """A stream wakes at the first token, at each whole piece, and at the end."""
    machine = Batching(MODEL)
    each = work("a", target=20, piece=8)
    machine.enter(each, 0.0)
    seen = []
    while (now := machine.next_event_at()) < math.inf:
        seen += [woken.written for woken in machine.advance(now)]
    assert seen == [1, 8, 16, 20]


def test_speed_takes_effect_at_once() -> None:
    """After a change to half speed the rest takes twice as long, also within a step."""
    machine = Batching(MODEL)
    machine.enter(work("a", target=101), 0.0)
    machine.set_speed(0.5, 1.0)
    machine.set_speed(2.0, 2.0)
    # 2 nominal seconds of prefill: 1 + 0.5 until t = 2, the rest and 11 s of decode at double speed
    assert finish(machine) == [(2.0 + 0.25 + 5.5, "a")]


def test_losing_all_leaves_an_empty_server() -> None:
    """All live requests are lost and the cache is empty; the server continues."""
    machine = Batching(MODEL)
    machine.enter(work("a"), 0.0)
    finish(machine)
    works = [work("b"), work("c")]
    for each in works:
        machine.enter(each, 100.0)
    machine.advance(100.0)
    assert machine.lose_all(101.0)[-2:] == works
    assert all(each.lost and each.over for each in works)
    assert (machine.running, len(machine.waiting), machine.pool.cache.blocks) == (0, 0, 0)
    again = work("a")
    machine.enter(again, 102.0)
    assert [rid for _, rid in finish(machine)] == ["a"]
    assert again.cached_tokens == 0


def test_prompts_and_answers_beyond_the_pool() -> None:
    """A prompt longer than the pool is aborted; new tokens are limited to the pool, as in the real server."""
    machine = Batching(MODEL, caching=False)
    huge, large = work("h", tokens=4096), work("l", tokens=4000, target=200)
    machine.enter(huge, 0.0)
    assert huge.aborted
    machine.enter(large, 0.0)
    finish(machine)
    assert (large.over, large.written) == (True, 94)


arrivals = st.lists(
    st.tuples(
        st.floats(0, 3),
        st.integers(1, 900),
        st.integers(0, 300),
        st.sampled_from(["", "s" * 600, "t" * 1500]),
        st.sampled_from(["", "", "", "", "abort", "leave", "stall", "stream"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=25,
)


class Run:
    """A machine that is driven through arrivals, and looked at after every event."""

    def __init__(self, asked: list[Any], **options: Any) -> None:
        model = dataclasses.replace(MODEL, pool_tokens=2000, kv_token_step_s=1e-5, attention_s=1e-6)
        self.machine = Batching(model, **options)
        self.ended: list[tuple[float, str, int]] = []
        self.works: list[Work] = []
        now = 0.0
        for number, (gap, tokens, target, text, fate, modest) in enumerate(asked):
            now += gap
            self._until(now)
            each = work(f"{number:03d}", tokens, target, text, stalls=fate == "stall")
            each.piece = 8 if fate == "stream" else 0
            each.max_new_tokens = target if modest else None
            self.works.append(each)
            self.machine.enter(each, now)
            if fate in ("abort", "leave"):
                self._until(now + gap / 2)
                now += gap / 2
                (self.machine.abort if fate == "abort" else self.machine.leave)(each, now)
            self._look()
        self._until(math.inf)
        for each in self.works:
            if each.stalls and not each.over:
                self.machine.abort(each, 1e9)
        self._until(math.inf)

    def _until(self, now: float) -> None:
        while (at := self.machine.next_event_at()) <= now and at < math.inf:
            for each in self.machine.advance(at):
                self._note(at, each)
            self._look()

    def _note(self, at: float, each: Work) -> None:
        if each.over:
            self.ended.append((at, each.rid, each.written))

    def _look(self) -> None:
        pool = self.machine.pool
        assert pool.private >= 0
        assert 0 <= pool.free <= pool.available <= pool.size
        assert pool.used >= 0
        assert self.machine.running <= MODEL.max_running_requests
        batch = list(self.machine.decoding.batch)
        steps = self.machine.decoding.steps
        held = sum(each.tokens + each.start - 1 + steps - each.joined for each in batch)
        assert self.machine.decoding.context == held
        if not self.machine.waiting and not self.machine.running:
            assert (pool.private, pool.cache.locked) == (0, 0)


@given(arrivals, st.sampled_from(["fcfs", "lpm"]), st.booleans())
def test_every_request_ends_once_and_the_pool_is_never_overdrawn(
    asked: list[Any], policy: str, caching: bool
) -> None:
    """Whatever comes: requests end exactly once, whole unless aborted, and all that they held is free."""
    run = Run(asked, policy=policy, caching=caching)
    assert sorted(rid for _, rid, _ in run.ended) == sorted(each.rid for each in run.works)
    for each in run.works:
        assert each.over
        assert each.aborted or each.written == each.target
    assert run.machine.pool.private == 0
    assert run.machine.pool.cache.locked == 0
    assert (run.machine.waiting.tokens, len(run.machine.waiting), run.machine.running) == (0, 0, 0)
    assert run.machine.decoding.reserve == 0
    again = Run(asked, policy=policy, caching=caching)
    assert again.ended == run.ended
