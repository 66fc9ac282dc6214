"""The adaptive cap against a fake server: it finds the level, keeps it, shrinks and recovers."""

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.kv_pool import Expected, Footprint
from streamsyn.fleet.limiter import FLOOR, START, AdaptiveLimiter
from streamsyn.fleet.wire import Load
from streamsyn.records import Request
from tests.examples import examples

REQUEST = Footprint.of(Request([{"role": "user", "content": "x" * 400}], {"max_tokens": 4000}))


@dataclass
class MadeUp:
    """A server that runs `batch` requests at a time; the client always has more for it."""

    limiter: AdaptiveLimiter
    batch: int
    now: float = 0.0
    caps: list[int] = field(default_factory=list)

    def tick(self, *, loads: bool = True, **figures: float) -> None:
        """One second: as much as the cap allows is there, some of it is answered, the load is read."""
        self.now += 1.0
        limiter = self.limiter
        limiter.in_flight = limiter.cap
        running = min(self.batch, limiter.in_flight)
        a_token = 0.01 * max(1.0, limiter.in_flight / self.batch)
        for number in range(max(1, running // 4) if not loads else 1):
            # by Little's law: a full server answers at its rate, whatever waits
            limiter.answered(self.now - 1 + (number + 1) / max(1, running // 4), a_token * 100, 100)
        if loads:
            load = Load(running, limiter.in_flight - running, max_running=0, taken_at=(self.now,))
            limiter.observe(_with(load, **figures), self.now)
        self.caps.append(limiter.cap)


def _with(load: Load, **figures: float) -> Load:
    values = {name: getattr(load, name) for name in Load.__slots__}
    return Load(**{**values, **figures})


@pytest.mark.parametrize("batch", [4, 32, 256, 1000])
def test_it_finds_the_batch_and_keeps_a_short_queue(batch: int) -> None:
    """The cap reaches the batch size within half a minute and then hardly changes."""
    server = MadeUp(AdaptiveLimiter(), batch)
    for _ in range(120):
        server.tick()
    late = server.caps[30:]
    assert batch < min(late)
    assert max(late) - batch < 128
    assert max(late) <= 1.3 * batch + 4
    assert max(late) - min(late) <= max(2, 0.1 * batch)


def test_it_never_grows_by_failures() -> None:
    """Requests that fail at once leave the server idle; that must not raise the cap."""
    limiter = AdaptiveLimiter()
    for second in range(60):
        limiter.in_flight = limiter.cap
        limiter.failed()
        limiter.observe(Load(running=0, waiting=0, taken_at=(second,)), second)
    assert START == limiter.cap


def test_it_does_not_grow_when_nothing_presses() -> None:
    """A cap that is never reached does not change."""
    limiter = AdaptiveLimiter()
    for second in range(60):
        limiter.in_flight = 3
        limiter.observe(Load(running=3, waiting=0, taken_at=(second,)), second)
    assert START == limiter.cap


def test_a_full_queue_lowers_it_once() -> None:
    """Many refusals from one full queue lower the cap once; it recovers later."""
    server = MadeUp(AdaptiveLimiter(), 100)
    for _ in range(30):
        server.tick()
    before = server.limiter.cap
    for _ in range(20):
        server.limiter.busy(server.now, 0.5)
    assert 0.8 * before <= server.limiter.cap < before
    assert 1 == server.limiter.decisions["queue_full"]
    server.now += 5
    for _ in range(60):
        server.tick()
    assert server.limiter.cap > 100


def test_a_retraction_lowers_it_and_stops_growth() -> None:
    """The KV pool was too small: the cap shrinks and does not grow for a while."""
    server = MadeUp(AdaptiveLimiter(), 200)
    for _ in range(30):
        server.tick()
    before = server.limiter.cap
    server.tick(retracted=3, waiting=0, running=before)
    assert server.limiter.cap < before
    lowered = server.limiter.cap
    for _ in range(5):
        server.tick(waiting=0, running=lowered)
    assert lowered == server.limiter.cap


def test_pressure_on_the_pool_stops_growth() -> None:
    """With the KV pool nearly full the cap does not grow, even without a queue."""
    server = MadeUp(AdaptiveLimiter(), 10_000)
    for _ in range(60):
        server.tick(token_usage=0.95)
    assert START == server.limiter.cap


@pytest.mark.parametrize("batch", [16, 128])
def test_without_readings_it_follows_the_answers(batch: int) -> None:
    """The cap grows while tokens/s grow, and shrinks when answers only get slower."""
    server = MadeUp(AdaptiveLimiter(), batch)
    for _ in range(600):
        server.tick(loads=False)
    late = server.caps[200:]
    assert 0.7 * batch <= min(late)
    assert max(late) <= 2 * batch


def test_stale_readings_are_ignored() -> None:
    """Readings with the same time stamp count as missing."""
    limiter = AdaptiveLimiter()
    for second in range(60):
        limiter.in_flight = limiter.cap
        limiter.observe(Load(running=0, waiting=0, taken_at=(1.0,)), second)
    assert 2 * START >= limiter.cap


def test_a_readmitted_server_starts_small() -> None:
    """After readmission the cap starts low: the server may have changed, and its cache is cold."""
    server = MadeUp(AdaptiveLimiter(slow_start_s=10.0), 500)
    for _ in range(30):
        server.tick()
    server.limiter.readmitted(server.now)
    assert START == server.limiter.cap
    assert 1 == server.limiter.cap_at(server.now)


def test_where_the_pool_is_the_limit_it_decides() -> None:
    """The cap is what the pool holds; readings are frequent until it holds half of that."""
    limiter = AdaptiveLimiter()
    held = [limiter.begin(REQUEST, 0.0) for _ in range(8)]
    limiter.observe(Load(8, 0, token_usage=0.01, pool_tokens=400_000, taken_at=(1.0,)), 1.0)
    assert (400_000 // 4 // 4000, "kv_pool", True) == (limiter.cap, limiter.last_decision, limiter.is_ramping)
    held += [limiter.begin(REQUEST, 1.0) for _ in range(100)]
    limiter.observe(Load(108, 0, token_usage=0.6, pool_tokens=400_000, taken_at=(2.0,)), 2.0)
    assert 108 < limiter.cap < 180
    assert not limiter.is_ramping
    for expected in held:
        limiter.end(expected)
    assert 0 == limiter.in_flight


def test_a_full_queue_keeps_the_cap_down_also_where_the_pool_is_the_limit() -> None:
    """After a refusal the pool's room does not count for a while."""
    limiter = AdaptiveLimiter()
    for _ in range(33):
        limiter.begin(REQUEST, 0.0)
    limiter.observe(Load(33, 0, token_usage=0.8, pool_tokens=400_000, taken_at=(1.0,)), 1.0)
    limiter.busy(1.0, 0.5)
    lowered = limiter.cap
    assert lowered <= 33 * 0.85
    limiter.observe(Load(33, 0, token_usage=0.8, pool_tokens=400_000, taken_at=(2.0,)), 2.0)
    assert lowered == limiter.cap
    limiter.observe(Load(33, 0, token_usage=0.8, pool_tokens=400_000, taken_at=(12.0,)), 12.0)
    assert limiter.cap > 100


def at_the_cap(pool_tokens: int) -> tuple[AdaptiveLimiter, list[Expected]]:
    """A limiter whose server runs as many requests as the cap allows."""
    limiter = AdaptiveLimiter()
    held = [limiter.begin(REQUEST, 0.0) for _ in range(8)]
    load = Load(8, 0, token_usage=0.01, pool_tokens=pool_tokens, taken_at=(1.0,))
    limiter.observe(load, 1.0, left=1)  # the rest fits into the pool, so nothing is spread
    held += [limiter.begin(REQUEST, 1.0) for _ in range(limiter.room(1.0))]
    assert limiter.cap == limiter.in_flight
    return limiter, held


def test_where_the_pool_is_the_limit_requests_are_replaced_several_at_a_time() -> None:
    """No place is filled before a fortieth of the cap is free; then all are."""
    limiter, held = at_the_cap(400_000)
    assert 4 == limiter.cap // 40
    rooms = []
    for _ in range(4):
        limiter.end(held.pop())
        rooms.append(limiter.room(4.0))
    assert [0, 0, 0, 4] == rooms
    for _ in range(4):
        assert limiter.has_room(4.0)
        held.append(limiter.begin(REQUEST, 4.0))
    limiter.end(held.pop())
    assert not limiter.has_room(4.0)


def test_all_places_come_back() -> None:
    """However few requests are left, each place is filled again once enough are free."""
    limiter, held = at_the_cap(400_000)
    while held:
        limiter.end(held.pop())
    assert limiter.cap == limiter.room(4.0)


def test_a_low_cap_is_filled_one_by_one() -> None:
    """A few long conversations never wait for each other."""
    limiter, held = at_the_cap(100_000)
    limiter.end(held.pop())
    assert 1 == limiter.room(4.0)


@examples(100)
@given(st.integers(0, 40), st.floats(0, 30), st.booleans(), st.booleans())
def test_a_query_changes_nothing(begun: int, now: float, is_back: bool, is_held: bool) -> None:
    """Asking for room, in a slow start, a hold or at the cap, has no effect on what follows."""
    limiter = AdaptiveLimiter(slow_start_s=10.0)
    if is_back:
        limiter.readmitted(0.0)
    if is_held:
        limiter.hold(5.0)
    for _ in range(begun):
        limiter.begin(REQUEST, 0.0)
    before = copy.deepcopy(limiter)
    room = limiter.room(now)
    assert limiter.has_room(now) == (room > 0)
    limiter.next_room_at(now)
    limiter.cap_at(now)
    assert not is_back or now >= 10 or limiter.cap_at(now) <= limiter.cap
    assert limiter.is_ramping
    assert before == limiter


EVENTS = st.sampled_from(["observe", "answered", "failed", "busy", "readmitted"])


@given(
    st.lists(
        st.tuples(EVENTS, st.integers(0, 300), st.integers(0, 300), st.floats(0, 1), st.floats(0, 5)),
        max_size=80,
    ),
    st.integers(1, 300),
)
def test_whatever_happens_it_stays_within_its_bounds(
    events: list[tuple[str, int, int, float, float]], ceiling: int
) -> None:
    """Never below the floor, never above the ceiling, and each move has its reason on record."""
    limiter, now = AdaptiveLimiter(min(START, ceiling), ceiling=ceiling), 0.0
    for name, first, second, share, seconds in events:
        now += seconds
        before = (limiter.cap, limiter.decisions.total())
        limiter.in_flight = min(first, limiter.cap)
        match name:
            case "observe":
                limiter.observe(Load(first, second, token_usage=share, retracted=first % 7 == 0), now)
            case "answered":
                limiter.answered(now, seconds, second)
            case "failed":
                limiter.failed()
                assert before[0] == limiter.cap
            case "busy":
                limiter.busy(now, share)
                assert limiter.cap <= before[0]
            case "readmitted":
                limiter.readmitted(now)
        assert min(FLOOR, ceiling) <= limiter.cap <= ceiling
        assert (limiter.cap != before[0]) == (limiter.decisions.total() != before[1])
