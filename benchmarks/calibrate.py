"""Fit the simulator's `cpu` cost model: seconds of a prefill and of a decode step on a real SGLang server.

    python -m benchmarks.calibrate [--repeats 3] [--out calibration.md]

Starts one server with the packaged model, as `streamsyn run --launch` does, and times its requests:

- prefill: one prompt of random token ids at a time, one new token; with an empty cache, repeated (all but
  the last token cached), and repeated with `EXTENSION` more tokens at the end;
- decode: a batch of equal requests, one of them streamed; a step is the time between two of its tokens. The
  others are not streamed because streamsyn seldom streams, and streaming costs the server time.

Each is fitted with every formula in `PREFILL_FORMULAS` or `STEP_FORMULAS` by least squares of the relative
error, which is printed. All times are medians over the rounds, because two shared cores are noisy.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import aiohttp
import numpy
import orjson

from streamsyn.fleet.launch import find_packaged_model, launched

PROMPT_TOKENS = (128, 512, 1024, 2048)
EXTENSION = 256
BATCHES = (1, 4, 8, 16, 32)
CONTEXT_TOKENS = (64, 512)
STEPS = 48
SETTLING = 8
"""Steps left out at each end: other requests may still be in prefill, or finished."""
TOKEN_IDS = range(1000, 40_000)
"""Ordinary tokens in every common vocabulary; special tokens have lower or higher ids."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prefill: the tokens that were computed and those that came from the cache."""

    uncached: int
    cached: int

    @property
    def context(self) -> int:
        return self.uncached + self.cached


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: requests in the batch, and their tokens in the KV cache in total."""

    batch: int
    kv_tokens: int


P = TypeVar("P", bound=Prefill | Step)


@dataclass(frozen=True, slots=True)
class Term(Generic[P]):
    """One term of a formula, without its coefficient."""

    name: str
    of: Callable[[P], float]


P0: Term[Prefill] = Term("p0", lambda _: 1.0)
P1: Term[Prefill] = Term("p1 * uncached", lambda point: point.uncached)
P2: Term[Prefill] = Term("p2 * uncached * context", lambda point: point.uncached * point.context)
P3: Term[Prefill] = Term("p3 * cached", lambda point: point.cached)
P4: Term[Prefill] = Term("p4 * pairs", lambda point: point.uncached * (point.cached + point.uncached / 2))
# SGLang's torch_native attention backend computes scores for the whole prompt, cached or not.
P5: Term[Prefill] = Term("p5 * context", lambda point: point.context)
P6: Term[Prefill] = Term("p6 * context^2", lambda point: point.context**2)
# In order: the simplest; the formula of the simulator's `CostModel`; the work of torch_native.
PREFILL_FORMULAS = ((P0, P1, P2), (P0, P1, P3, P4), (P0, P1, P5, P6))

D0: Term[Step] = Term("d0", lambda _: 1.0)
D1: Term[Step] = Term("d1 * batch", lambda point: point.batch)
D2: Term[Step] = Term("d2 * kv_tokens", lambda point: point.kv_tokens)
STEP_FORMULAS = ((D0, D1, D2),)


@dataclass(frozen=True, slots=True)
class Fit(Generic[P]):
    """A formula with its coefficients, in seconds."""

    terms: tuple[Term[P], ...]
    coefficients: tuple[float, ...]

    def seconds(self, point: P) -> float:
        pairs = zip(self.terms, self.coefficients, strict=True)
        return sum(coefficient * term.of(point) for term, coefficient in pairs)

    def __str__(self) -> str:
        pairs = zip(self.terms, self.coefficients, strict=True)
        return ", ".join(f"{term.name}: {coefficient:.3g} s" for term, coefficient in pairs)


def fitted(terms: tuple[Term[P], ...], seconds: dict[P, float]) -> Fit[P]:
    """Return the non-negative coefficients with the least squares of the relative error.

    Terms whose coefficient would be negative are dropped, the most negative first.
    """
    weights = numpy.array([1 / value for value in seconds.values()])
    columns = numpy.array([[term.of(point) for term in terms] for point in seconds]) * weights[:, None]
    used = list(range(len(terms)))
    while True:
        found = numpy.linalg.lstsq(columns[:, used], numpy.ones(len(seconds)), rcond=None)[0]
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    coefficients = [0.0] * len(terms)
    for index, value in zip(used, found, strict=True):
        coefficients[index] = float(value)
    return Fit(terms, tuple(coefficients))


async def flush(session: aiohttp.ClientSession, url: str) -> None:
    """Empty a server's radix cache; retry for 60 s, because the server refuses while a request runs."""
    async with asyncio.timeout(60):
        while True:
            async with session.post(f"{url}/flush_cache") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.1)


class Probe:
    """Sends prompts of token ids to the `/generate` route of one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int) -> None:
        self._session = session
        self._url = url
        self._random = random.Random(seed)

    def prompt(self, tokens: int) -> list[int]:
        """Return a random prompt of `tokens` token ids."""
        return self._random.choices(TOKEN_IDS, k=tokens)

    async def flush(self) -> None:
        await flush(self._session, self._url)

    async def generate(self, prompts: Sequence[list[int]], tokens: int) -> list[dict[str, Any]]:
        """Send the prompts as one batch and return the answers of `tokens` tokens each."""
        async with self._session.post(f"{self._url}/generate", json=_body(prompts, tokens)) as response:
            response.raise_for_status()
            answers: list[dict[str, Any]] = await response.json()
            return answers

    async def token_times(self, prompt: list[int], tokens: int) -> list[float]:
        """Stream an answer and return the arrival time of each token, in seconds."""
        times: list[float] = []
        body = {**_body([prompt], tokens), "stream": True}
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    assert "error" not in orjson.loads(line[6:]), line
                    times.append(time.perf_counter())
        return times


def _body(prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": tokens, "temperature": 0.8, "ignore_eos": True}
    return {"input_ids": list(prompts), "sampling_params": sampling}


async def prefill_times(probe: Probe) -> dict[Prefill, float]:
    """Measure one prefill of each kind, in seconds."""
    seconds: dict[Prefill, float] = {}

    async def measure(prompt: list[int]) -> None:
        started = time.perf_counter()
        [answer] = await probe.generate([prompt], 1)
        measured = time.perf_counter() - started
        cached = answer["meta_info"]["cached_tokens"]
        seconds[Prefill(uncached=len(prompt) - cached, cached=cached)] = measured

    for tokens in PROMPT_TOKENS:
        await probe.flush()
        prompt = probe.prompt(tokens)
        await measure(prompt)
        await measure(prompt)
        await measure(prompt + probe.prompt(EXTENSION))
    return seconds


async def step_time(probe: Probe, batch: int, context: int) -> tuple[Step, float]:
    """Return the median seconds of a decode step of `batch` requests with prompts of `context` tokens."""
    await probe.flush()
    others = [probe.prompt(context) for _ in range(batch - 1)]
    # The others write a few tokens more, so that the streamed request never runs alone.
    async with asyncio.TaskGroup() as group:
        if others:
            group.create_task(probe.generate(others, STEPS + SETTLING))
        streamed = group.create_task(probe.token_times(probe.prompt(context), STEPS))
    times = streamed.result()
    assert len(times) == STEPS, f"{len(times)} chunks for {STEPS} tokens"
    gaps = [late - early for early, late in itertools.pairwise(times)]
    return Step(batch, batch * (context + STEPS // 2)), statistics.median(gaps[SETTLING:-SETTLING])


async def step_times(probe: Probe) -> dict[Step, float]:
    """Measure one decode step of each kind, in seconds."""
    return dict([await step_time(probe, batch, context) for context in CONTEXT_TOKENS for batch in BATCHES])


def medians(rounds: Sequence[dict[P, float]]) -> dict[P, float]:
    """Return the median of each point over the rounds."""
    return {point: statistics.median(one[point] for one in rounds) for point in rounds[0]}


def spread(rounds: Sequence[dict[P, float]], point: P) -> float:
    """Return the slowest round of a point divided by the fastest."""
    times = [one[point] for one in rounds]
    return max(times) / min(times)


def report(title: str, rounds: Sequence[dict[P, float]], formulas: Sequence[tuple[Term[P], ...]]) -> str:
    """Return a Markdown table of the measured times and the ratio of each fitted formula to them."""
    seconds = medians(rounds)
    fits: list[Fit[P]] = [fitted(terms, seconds) for terms in formulas]
    numbers = range(1, len(fits) + 1)
    head = ["measured s", "slowest / fastest", *(f"formula {number} / measured" for number in numbers)]
    lines = [f"## {title}", ""]
    lines += [f"formula {number}: {fit}" for number, fit in enumerate(fits, 1)]
    lines += ["", f"| point | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for point, measured in seconds.items():
        ratios = [f"{fit.seconds(point) / measured:.2f}" for fit in fits]
        cells = [str(point), f"{measured:.3f}", f"{spread(rounds, point):.2f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    errors = [
        max(abs(fit.seconds(point) / measured - 1) for point, measured in seconds.items()) for fit in fits
    ]
    lines += [
        "",
        *(f"formula {number}: maximum relative error {error:.0%}" for number, error in enumerate(errors, 1)),
    ]
    return "\n".join(lines)


async def calibrate(repeats: int, folder: Path) -> AsyncGenerator[str, None]:
    """Start a server, measure all points `repeats` times, and yield a report after each round."""
    prefills: list[dict[Prefill, float]] = []
    steps: list[dict[Step, float]] = []
    async with (
        launched(find_packaged_model(), log_path=folder / "sglang.log") as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session,
    ):
        probe = Probe(session, server.url, seed=1)
        await step_time(probe, batch=1, context=64)  # the first forward passes are slow
        loads = [os.getloadavg()[0]]
        for number in range(1, repeats + 1):
            prefills.append(await prefill_times(probe))
            steps.append(await step_times(probe))
            loads.append(os.getloadavg()[0])
            load = ", ".join(f"{value:.1f}" for value in loads)
            yield "\n\n".join(
                [
                    f"# {server.model}, median of {number} rounds, load average {load} (idle machine: 1)",
                    report("prefill", prefills, PREFILL_FORMULAS),
                    report("decode step", steps, STEP_FORMULAS),
                ]
            )


async def run(repeats: int, out: Path | None) -> None:
    """Print the report after each round, and write the latest to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        async with aclosing(calibrate(repeats, Path(folder))) as reports:
            async for text in reports:
                print(text, flush=True)
                if out is not None:
                    await asyncio.to_thread(out.write_text, text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    asyncio.run(run(args.repeats, args.out))


if __name__ == "__main__":
    main()
