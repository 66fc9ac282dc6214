"""The cost models: their arithmetic, the measurements they reproduce, and the capacity computed from them."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.simulator.batching import Batching
from streamsyn.simulator.costs import CPU, H100, CostModel, capacity, largest_batch
from streamsyn.simulator.engine import Work
from tests.examples import in_turn


@given(
    st.sampled_from([CPU, H100]),
    st.integers(1, 2000),
    st.integers(0, 10**6),
    st.integers(0, 5000),
    st.floats(0, 1),
)
def test_steps_until_is_the_inverse_of_decode(
    model: CostModel, batch: int, context: int, steps: int, share: float
) -> None:
    """The step that ends at a time is found again, and within a step the next boundary."""
    ends = model.decode(batch, context, steps)
    assert model.steps_until(batch, context, ends) == steps
    length = model.decode(batch, context, steps + 1) - ends
    within = ends + share * length * 0.999 + length * 0.0005
    assert model.steps_until(batch, context, within) == steps + 1


def test_decode_is_the_sum_of_its_steps() -> None:
    """The closed form counts the growth of every step."""
    steps = [H100.decode(7, 1000 + 7 * passed, 1) for passed in range(300)]
    assert H100.decode(7, 1000, 300) == pytest.approx(sum(steps))


def test_a_prompt_in_chunks_costs_the_same_attention() -> None:
    """Splitting a prompt adds the fixed cost of a prefill and nothing else."""
    whole = H100.prefill([(100, 900)])
    cut = H100.prefill([(100, 500)]) + H100.prefill([(600, 400)])
    assert cut == pytest.approx(whole + H100.prefill_s)


def test_invalid_limits() -> None:
    """Invalid settings are refused by name."""
    with pytest.raises(ConfigError, match="pool_tokens"):
        dataclasses.replace(CPU, pool_tokens=0)
    with pytest.raises(ConfigError, match="step_s"):
        dataclasses.replace(CPU, step_s=0.0)


@in_turn(
    ("uncached", "cached", "seconds"),
    [
        (128, 0, 0.298),
        (512, 0, 1.072),
        (1024, 0, 2.170),
        (2048, 0, 4.954),
        (1, 127, 0.130),
        (1, 511, 0.347),
        (1, 1023, 0.864),
        (1, 2047, 2.665),
        (256, 128, 0.637),
        (256, 1024, 1.412),
        (256, 2048, 3.346),
    ],
)
def test_cpu_prefills_as_measured(uncached: int, cached: int, seconds: float) -> None:
    """Cold prompts, cached ones and those in between, on the real server."""
    assert CPU.prefill([(cached, uncached)]) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("batch", "tokens", "seconds"), [(1, 88, 0.062), (4, 352, 0.089), (8, 704, 0.116)])
def test_cpu_decodes_as_measured(batch: int, tokens: int, seconds: float) -> None:
    """A step of `batch` requests with `tokens` tokens in context."""
    assert CPU.decode(batch, tokens, 1) == pytest.approx(seconds, rel=0.1)


def test_h100_is_near_published_measurements() -> None:
    """The measurements in its docstring, within 20 %."""
    assert 1 / H100.decode(1, 40, 1) == pytest.approx(144.0, rel=0.05)
    assert capacity(H100, 4065, 0, 4) * 4065 == pytest.approx(27_670, rel=0.2)
    assert offline(H100, 1000, 220, 200) == pytest.approx(16_215, rel=0.2)


def offline(model: CostModel, requests: int, prompt_tokens: int, tokens: int) -> float:
    """New tokens a second when all come at once."""
    machine, now, left = Batching(model, caching=False), 0.0, requests
    for number in range(requests):
        machine.enter(Work(f"{number}", [0] * prompt_tokens, target=tokens, max_new_tokens=tokens), 0.0)
    while left:
        now = machine.next_event_at()
        left -= len(machine.advance(now))
    return requests * tokens / now


def closed_loop(
    model: CostModel, prompt_tokens: int, cached_tokens: int, mean_tokens: int, *, requests: int
) -> float:
    """Requests a second in the middle of a run in which there are always twice as many as fit."""
    machine, rng, now = Batching(model), random.Random(0), 0.0
    ends: list[float] = []
    shared = "s" * 4 * cached_tokens

    def enter() -> None:
        number = len(machine.live()) + len(ends)
        own = f"{number:08d}" * prompt_tokens
        tokens = round(mean_tokens * rng.uniform(0.8, 1.2))
        prompt = shared + own[: 4 * (prompt_tokens - cached_tokens)]
        machine.enter(Work(f"{number}", prompt, target=tokens, max_new_tokens=tokens), now)

    for _ in range(2 * largest_batch(model, prompt_tokens, cached_tokens, mean_tokens)):
        enter()
    while len(ends) < requests:
        now = machine.next_event_at()
        for work in machine.advance(now):
            machine.leave(work, now)
            ends.append(now)
            enter()
    first, last = requests // 4, requests - 1
    return (last - first) / (ends[last] - ends[first])


@pytest.mark.parametrize(
    ("model", "prompt_tokens", "cached_tokens", "mean_tokens"),
    [
        (dataclasses.replace(CPU, pool_tokens=100_000), 300, 0, 120),
        (dataclasses.replace(CPU, pool_tokens=100_000), 512, 448, 120),
        (dataclasses.replace(H100, max_running_requests=96), 500, 0, 400),
        (dataclasses.replace(H100, max_running_requests=96), 1024, 960, 400),
        (dataclasses.replace(H100, max_running_requests=32), 9000, 0, 200),
    ],
)
def test_a_closed_loop_reaches_the_capacity(
    model: CostModel, prompt_tokens: int, cached_tokens: int, mean_tokens: int
) -> None:
    """With requests in plenty a server does what is counted from its costs, within 3 %."""
    counted = capacity(model, prompt_tokens, cached_tokens, mean_tokens)
    reached = closed_loop(model, prompt_tokens, cached_tokens, mean_tokens, requests=1500)
    assert reached == pytest.approx(counted, rel=0.03)


def test_where_the_pool_is_the_limit_a_closed_loop_stays_below() -> None:
    """Room that is kept and requests that are retracted cost at most a tenth of the capacity."""
    counted = capacity(H100, 500, 0, 1500)
    reached = closed_loop(H100, 500, 0, 1500, requests=3000)
    assert 0.9 * counted < reached < 1.01 * counted
