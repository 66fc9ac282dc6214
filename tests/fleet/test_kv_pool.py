"""The cap by the KV pool: what requests are expected to hold, an even pace, and retractions."""

from collections import deque
from dataclasses import dataclass, field
from random import Random
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.kv_pool import Expected, Footprint, PoolCap
from streamsyn.fleet.wire import Load
from streamsyn.records import Completion, Request
from tests.examples import examples

POOL = 100_000


def request(max_tokens: int = 1000, chars: int = 400, task: str = "", **fields: Any) -> Footprint:
    messages = [{"role": "user", "content": "x" * chars}]
    return Footprint.of(Request(messages, {"max_tokens": max_tokens}, task=task, **fields))


def answer(tokens: int, prompt: int = 100, cached: int = 0, *, estimated: bool = False) -> Completion:
    return Completion("", "stop", prompt, cached, tokens, "model", "server", tokens_estimated=estimated)


def load(used: float = 0, running: int = 0, waiting: int = 0, **fields: Any) -> Load:
    return Load(running, waiting, token_usage=used / POOL, pool_tokens=POOL, **fields)


def test_before_any_answer_the_length_asked_for_is_expected() -> None:
    """Prompts count four characters a token; a text to be scored does not grow."""
    pool = PoolCap()
    assert pool.expected(request()) == Expected(100, 1000)
    assert pool.expected(request(scored="text")) == Expected(100, 0)
    assert pool.expected(Footprint.of(Request([], {}))).growth == 4096


def test_answers_are_expected_as_they_were_seen_by_task_and_step() -> None:
    """Each task and each `max_tokens` has its own mean; the length asked for fades."""
    pool = PoolCap()
    for _ in range(300):
        pool.learn(request(task="a"), answer(400))
        pool.learn(request(300, task="a"), answer(20))
        pool.learn(request(task="b"), answer(900))
    found = [pool.expected(request(asked, task=task)).growth for asked, task in ((1000, "a"), (300, "a"))]
    assert found == [pytest.approx(400, rel=0.05), pytest.approx(20, rel=0.5)]
    assert pool.expected(request(task="b")).growth == pytest.approx(900, rel=0.01)
    assert pool.expected(request(task="new")).growth == 1000


def test_the_first_answers_to_come_are_the_shortest() -> None:
    """A few of them do not make all of the others short."""
    pool = PoolCap()
    for _ in range(200):
        pool.begin(request())
    for _ in range(5):
        pool.learn(request(), answer(10))
    assert pool.expected(request()).growth > 800


def test_prompts_are_expected_as_they_were_seen_without_what_is_shared() -> None:
    """Tokens a character, and cached tokens of first messages; estimated counts teach nothing."""
    pool = PoolCap()
    for _ in range(50):
        pool.learn(request(chars=400), answer(10, prompt=200, cached=150))
        pool.learn(request(chars=400), answer(10, prompt=5, estimated=True))
    assert pool.expected(request(chars=800)).prompt == 250


def test_a_template_is_known_to_be_shared_before_any_answer() -> None:
    """The system message does not count where others have it as well; answers then show what was cached."""
    pool = PoolCap()
    messages = [{"role": "system", "content": "s" * 1200}, {"role": "user", "content": "x" * 400}]
    alone, shared = (
        Footprint.of(Request(messages, {}, prefixes=prefixes)) for prefixes in ((), ("template",))
    )
    assert (pool.expected(alone).prompt, pool.expected(shared).prompt) == (400, 100)
    pool.learn(shared, answer(10, prompt=400, cached=310))
    assert pool.expected(shared).prompt == 90


def test_a_conversation_is_expected_to_grow_to_its_end() -> None:
    """Its first question is what it holds from the start, in each of its requests."""
    pool = PoolCap()
    assert pool.expected(request(chars=400, conversation_tokens=9000)) == Expected(100, 9000)
    messages = [("user", "x" * 400), ("assistant", "y" * 8000), ("user", "on")]
    said = [{"role": role, "content": content} for role, content in messages]
    later = Footprint.of(Request(said, {"max_tokens": 1000}, conversation_tokens=9000))
    assert pool.expected(later) == Expected(100, 9000)
    pool.learn(later, answer(1000, prompt=2100, cached=2000))
    assert pool.expected(later) == Expected(100, 9000)


def test_the_kinds_are_bounded() -> None:
    """Any number of tasks costs a bounded amount of memory."""
    pool = PoolCap()
    for number in range(3000):
        pool.learn(request(task=str(number)), answer(10))
    assert len(pool._answers) == 1000


def test_only_where_the_pool_is_the_limit() -> None:
    """Without a pool size, before any request, or with fewer seats than the pool holds, there is no cap."""
    pool = PoolCap()
    assert pool.cap(load()) is None
    pool.begin(request())
    assert pool.cap(Load(1, 0)) is None
    assert pool.cap(load(max_running=120)) is None
    assert pool.cap(load(max_running=200)) is not None
    assert pool.level == pytest.approx(0.87 * POOL / 600)


@dataclass
class MadeUpServer:
    """A server that runs all it gets, one token a step each; at a full pool the youngest are retracted."""

    lengths: Random = field(default_factory=lambda: Random(0))
    running: dict[int, list[int]] = field(default_factory=dict)
    """By number: tokens written, and tokens of the answer."""
    waiting: deque[tuple[int, list[int]]] = field(default_factory=deque)
    retracted: int = 0
    numbers: int = 0

    @property
    def used(self) -> int:
        return sum(100 + written for written, _ in self.running.values())

    def begin(self) -> None:
        self.running[self.numbers] = [0, round(self.lengths.uniform(800, 1000))]
        self.numbers += 1

    def step(self) -> list[int]:
        """Let a step pass. Return the tokens of the answers that ended."""
        for each in self.running.values():
            each[0] += 1
        while self.used > POOL:
            number, each = self.running.popitem()
            self.waiting.append((number, each))
            self.retracted += 1
        while self.waiting and self.used < 0.9 * POOL:
            self.running.update([self.waiting.popleft()])
        ended = [number for number, (written, whole) in self.running.items() if written >= whole]
        return [self.running.pop(number)[1] for number in ended]


def run(fixed: int | None, steps: int = 8_000) -> tuple[MadeUpServer, list[int], list[float]]:
    """There is always more work. Return the server, and the caps and the use of the pool at all readings."""
    server, pool, held = MadeUpServer(), PoolCap(), deque[Expected]()
    cap, caps, used = fixed or 8, [], []
    for step in range(steps):
        while len(held) < cap:
            held.append(pool.begin(request()))
            server.begin()
        for tokens in server.step():
            pool.end(held.popleft())
            pool.learn(request(), answer(tokens))
        if step % 20 == 0:
            told = load(server.used, len(server.running), len(server.waiting))
            found = pool.cap(told)
            assert found is not None
            cap = fixed or found
            caps.append(cap)
            used.append(server.used / POOL)
    return server, caps, used


def test_an_even_pace_fills_the_pool_without_retractions() -> None:
    """From a cold start on nothing is retracted; the pool is four fifths full, and the cap is steady."""
    server, caps, used = run(None)
    assert server.retracted == 0
    late = len(caps) // 6
    assert mean(used[late:]) > 0.8
    assert min(caps[late:]) > 0.75 * max(caps)


def test_the_same_number_from_the_start_overflows_the_pool() -> None:
    """Requests that began together grow together: a fixed cap of the same level retracts a tenth of them."""
    level = max(run(None)[1])
    server, _, _ = run(level)
    assert server.retracted > 0.1 * level


def test_no_more_begin_than_fit_when_all_have_begun_together() -> None:
    """An empty pool takes a quarter; while that grows, others follow at a pace of level to an answer."""
    pool = PoolCap()
    held = [pool.begin(request()) for _ in range(8)]
    assert pool.cap(load(800, running=8)) == POOL // 4 // 1000
    level = pool.level
    held += [pool.begin(request()) for _ in range(17)]
    halves = [pool.cap(load(25 * 100 + level * share * share * 500, running=25)) for share in (0.25, 0.5, 1)]
    assert halves == [pytest.approx(share * level, abs=1) for share in (0.25, 0.5, 1)]


def test_what_fits_with_whole_answers_is_not_spread() -> None:
    """90 requests of 1,100 tokens fit into the pool even if all of them end together; 91 do not."""
    pool = PoolCap()
    held = [pool.begin(request()) for _ in range(8)]
    caps = [pool.cap(load(800, running=len(held)), left) for left in (90, 91)]
    assert caps == [int(pool.level), POOL // 4 // 1000]


def test_a_long_queue_is_not_refilled() -> None:
    """Requests that wait at the server would begin together."""
    pool = PoolCap()
    for _ in range(140):
        pool.begin(request())
    assert pool.cap(load(84_000, running=100, waiting=40)) == 108
    assert pool.cap(load(84_000, running=136, waiting=4)) == 142


def test_a_retraction_lowers_the_level_once_towards_what_runs() -> None:
    """Readings of the same retraction count once; with the next generation the level recovers."""
    pool = PoolCap()
    held = [pool.begin(request()) for _ in range(140)]
    pool.cap(load(90_000, running=140))
    before = pool.level
    for _ in range(10):
        pool.cap(load(90_000, running=120, waiting=20, retracted=20))
    assert pool.level == pytest.approx(0.95 * 120)
    for expected in held:
        pool.learn(request(), answer(1000))
        pool.end(expected)
    pool.cap(load(running=0, retracted=0))
    assert pool.level == pytest.approx(0.95 * 120)
    for _ in range(300):
        pool.learn(request(), answer(1000))
    pool.cap(load())
    assert pool.level == before


@examples(100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "end", "learn", "cap"]),
            st.integers(0, 5000),
            st.integers(0, 400),
            st.integers(0, 400),
        ),
        max_size=60,
    )
)
def test_whatever_happens_the_level_is_at_least_half_and_the_cap_within_it(
    events: list[tuple[str, int, int, int]],
) -> None:
    """The sums are those of the requests in flight; at the end of all they are empty."""
    pool, held = PoolCap(), list[Expected]()
    for name, tokens, running, waiting in events:
        asked = request(max(1, tokens), chars=running)
        match name:
            case "begin":
                held.append(pool.begin(asked))
            case "end" if held:
                pool.end(held.pop(tokens % len(held)))
            case "learn":
                pool.learn(asked, answer(waiting, prompt=running, cached=running // 2))
            case "cap":
                cap = pool.cap(load(tokens * 20, running, waiting, retracted=tokens % 3))
                if cap is None:
                    continue
                fits = POOL / mean(each.prompt + each.growth / 2 for each in held or [pool._last])
                assert 1 <= cap <= pool.level
                assert pool.level >= max(1, 0.999 * 0.87 / 2 * fits)
    assert (pool._number, pool._prompts, pool._growth) == (
        len(held),
        sum(each.prompt for each in held),
        sum(each.growth for each in held),
    )
