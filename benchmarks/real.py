"""streamsyn on real SGLang servers with the packaged model: throughput, and prompt tokens saved by the cache.

    python -m benchmarks.real throughput [--requests 32] [--concurrency 16] [--max-tokens 96] [--rounds 3]
    python -m benchmarks.real sections [--seeds 8] [--target-tokens 3000] [--section-tokens 430]

`throughput`: `streamsyn run` and `sglang.bench_serving` take turns at sending the same requests at the same
concurrency to one server. A loop that sends one request at a time, as the paper's scripts do, sends fewer
of them. The result is output tokens a second: the completion tokens in the server's `usage`, divided by the
time from the first request sent to the last answer received on the client's clock. The comparison is fair:

- all send the messages that streamsyn's recipe renders, in the same order, to /v1/chat/completions;
  `ignore_eos` makes every answer `--max-tokens` long, and no answer is checked or requested again; only
  streamsyn streams, and only the one request that brings the common prefix into the cache;
- start-up does not count: both programs prepare first, then send. streamsyn's time runs from the earliest
  to the latest timestamp in its log's `attempts`; bench_serving's is the `duration` that it reports, which
  includes one GET /server_info (about 20 ms);
- the cache is flushed before each round, so each program computes the common prefix itself.

`sections`: contexts are written section by section on two servers, with the radix cache and without it. The
results are the cached and computed prompt tokens of all steps in the log. A logit bias makes the end of an
answer unlikely, so that every section reaches its maximum length and both runs have the same number of
steps. (`ignore_eos` would not do: the text after an end token is tokenized differently in the next prompt.)
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.calibrate import flush
from benchmarks.common import seeds_file
from streamsyn.config.loading import Config, load, parse_override
from streamsyn.fleet.launch import (
    LaunchedServer,
    find_packaged_model,
    find_python,
    is_cpu_install,
    launched,
    server_command,
)
from streamsyn.fleet.wire import CHAT
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Draft, Request, Seed
from streamsyn.seeds.reader import SeedReader

UNCHECKED = {
    "recipe.tries": "1",
    "checks.min_words": "0",
    "checks.max_repetition": "1",
    "checks.refusal": "false",
    "checks.prompt_echo": "false",
    "checks.qa_pasted": "false",
    "assembly.write": "false",
}
"""Settings that accept every answer, whatever a small model writes."""
IGNORE_EOS = "{ignore_eos = true}"

# With a CPU build of torch, sglang can be imported only after the installed launcher. bench_serving imports
# `datasets`, which is not installed, for a data set that is not used here.
CPU_BENCH = """
import importlib.machinery, runpy, sys, types
import sglang_cpu_server
datasets = types.ModuleType("datasets")
datasets.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
datasets.load_dataset = None
sys.modules["datasets"] = datasets
runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
"""
MODES: dict[str, tuple[str, ...]] = {"radix cache": (), "no radix cache": ("--disable-radix-cache",)}
TARGETS = {"throughput": 0.97, "cached": 0.8, "uncached": 4.0}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Output:
    """Completion tokens that a server wrote, and the seconds that it took."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Bench:
    """One server and the requests that each program sends to it."""

    server: LaunchedServer
    folder: Path
    settings: Mapping[str, str]
    requests: Sequence[Request]
    concurrency: int

    def streamsyn(self) -> Output:
        """Send the requests with `streamsyn run`."""
        seeds = seeds_file(self.folder, len(self.requests))
        rows = contexts(self.folder, seeds, [self.server.url], self.settings)
        assert len(rows) == len(self.requests), f"{len(rows)} contexts for {len(self.requests)} requests"
        attempts = [attempt for row in rows for attempt in row["attempts"]]
        assert len(attempts) == len(rows), "a request was retried"
        first = min(attempt["at"] for attempt in attempts)
        last = max(attempt["at"] + attempt["seconds"] for attempt in attempts)
        return Output(sum(row["completion_tokens"] for row in rows), last - first)

    def bench_serving(self) -> Output:
        """Send the requests with SGLang's own benchmark, sglang.bench_serving."""
        dataset, report = self.folder / "requests.jsonl", self.folder / "bench.jsonl"
        dataset.write_bytes(b"".join(orjson.dumps(self._body(request)) + b"\n" for request in self.requests))
        report.unlink(missing_ok=True)
        python = find_python()
        launch = server_command(python, find_packaged_model(), 0, gpu=not is_cpu_install(python))
        done = subprocess.run(
            self._bench_command(python, dataset, report),
            env={**os.environ, **launch.environment},
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.decode()[-2000:])
        figures = json.loads(report.read_bytes())  # orjson refuses the Infinity in it
        assert figures["completed"] == len(self.requests), done.stdout.decode()[-2000:]
        return Output(figures["total_output_tokens"], figures["duration"])

    async def one_at_a_time(self, session: aiohttp.ClientSession, number: int) -> Output:
        """Send the first `number` requests, each after the answer to the one before."""
        tokens, started = 0, time.perf_counter()
        for request in self.requests[:number]:
            async with session.post(self.server.url + CHAT, json=self._body(request)) as response:
                response.raise_for_status()
                tokens += (await response.json())["usage"]["completion_tokens"]
        return Output(tokens, time.perf_counter() - started)

    def _body(self, request: Request) -> Row:
        return {"model": self.server.model, "messages": request.messages, **request.sampling}

    def _bench_command(self, python: Path, dataset: Path, report: Path) -> list[str]:
        module = ["-c", CPU_BENCH] if is_cpu_install(python) else ["-m", "sglang.bench_serving"]
        options = {
            "backend": "sglang-oai-chat",
            "base-url": self.server.url,
            "model": self.server.model,
            "tokenizer": str(find_packaged_model()),
            "dataset-name": "openai",
            "dataset-path": str(dataset),
            "num-prompts": str(len(self.requests)),
            "max-concurrency": str(self.concurrency),
            "warmup-requests": "0",
            "output-file": str(report),
        }
        pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
        return [str(python), *module, *pairs, "--disable-stream", "--disable-tqdm"]


def contexts(folder: Path, seeds: Path, urls: Sequence[str], settings: Mapping[str, str]) -> list[Row]:
    """Run `streamsyn run` in a new directory and return the rows of its contexts.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "streamsyn", "run", "--seeds", str(seeds), "--out", str(out)]
    command += [part for url in urls for part in ("--server", url)]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run([*command, "--no-progress"], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    shards = sorted((out / "contexts").glob("*.jsonl"))
    return [orjson.loads(line) for shard in shards for line in shard.read_bytes().splitlines()]


def rendered(seeds: Path, settings: Mapping[str, str]) -> list[Request]:
    """Return the requests that `streamsyn run` sends for these seeds, in order."""
    overrides = [parse_override(f"{key}={value}") for key, value in settings.items()]
    config: Config = load(None, [*overrides, ("seeds.sources", [{"path": str(seeds)}])])
    recipe = load_recipe(config.recipe, config.checks)
    reader = SeedReader(config.seeds, config.run.seed, spool_folder=None)
    entries = [entry for batch in reader.batches(lambda _: False) for entry in batch]
    return [next(recipe.steps(Draft(seed))) for seed in entries if isinstance(seed, Seed)]


async def throughput(args: argparse.Namespace, folder: Path) -> None:
    settings = {
        **UNCHECKED,
        "recipe.max_tokens": str(args.max_tokens),
        "recipe.sampling": IGNORE_EOS,
        "fleet.concurrency": str(args.concurrency),
    }
    requests = rendered(seeds_file(folder, args.requests), settings)
    outputs: dict[str, list[Output]] = {"streamsyn run": [], "sglang.bench_serving": []}
    async with (
        launched(find_packaged_model(), log_path=folder / "sglang.log") as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session,
    ):
        bench = Bench(server, folder, settings, requests, args.concurrency)
        programs: dict[str, Callable[[], Output]] = dict(
            zip(outputs, (bench.streamsyn, bench.bench_serving), strict=True)
        )
        await bench.one_at_a_time(session, 1)  # the first forward passes are slow
        for number in range(args.rounds):
            for name, program in programs.items():
                await flush(session, server.url)
                outputs[name].append(await asyncio.to_thread(program))
                print(f"round {number + 1}, {name}: {outputs[name][-1]}", flush=True)
        await flush(session, server.url)
        alone = await bench.one_at_a_time(session, args.sequential)
    _print_throughput(args, outputs, alone)


def _print_throughput(args: argparse.Namespace, outputs: dict[str, list[Output]], alone: Output) -> None:
    ours, theirs = ([output.rate for output in measured] for measured in outputs.values())
    pairs = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    print(f"\n{args.requests} requests of {args.max_tokens} tokens, concurrency {args.concurrency}")
    print(f"{'':28}{'tokens/s':>10}{'rounds':>28}")
    for name, measured in outputs.items():
        rounds = ", ".join(f"{output.rate:.1f}" for output in measured)
        print(f"{name:28}{statistics.median(output.rate for output in measured):10.1f}{rounds:>28}")
    print(f"{f'one at a time ({args.sequential} requests)':28}{alone.rate:10.1f}")
    ratio, target = statistics.median(pairs), TARGETS["throughput"]
    print(f"streamsyn / bench_serving   {ratio:10.3f}  (median of the rounds' ratios; target: {target})")
    print(f"streamsyn / one at a time   {statistics.median(ours) / alone.rate:10.2f}")


@dataclass(frozen=True, slots=True)
class Totals:
    """Steps and tokens of a run."""

    contexts: int
    steps: int
    written: int
    tokens: int
    cached: int

    @property
    def uncached(self) -> int:
        return self.tokens - self.cached

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Totals":
        """Add up the steps of the rows, with tokens as the servers counted them."""
        steps = [step for row in rows for step in row["steps"]]
        written, tokens, cached = (
            sum(step[name] for step in steps)
            for name in ("completion_tokens", "prompt_tokens", "cached_tokens")
        )
        return cls(len(rows), len(steps), written, tokens, cached)


async def sections(args: argparse.Namespace, folder: Path) -> None:
    settings = {
        **UNCHECKED,
        "recipe.use": "sections",
        "recipe.target_tokens": str(args.target_tokens),
        "recipe.section_tokens": str(args.section_tokens),
        "recipe.sampling": _without_end(find_packaged_model()),
    }
    found: dict[str, Totals] = {}
    for name, flags in MODES.items():
        if args.only not in (None, name):
            continue
        started = time.perf_counter()
        async with AsyncExitStack() as stack:
            urls = []
            for number in range(2):
                server = launched(
                    find_packaged_model(), log_path=folder / f"sglang-{number}.log", extra_args=flags
                )
                urls.append((await stack.enter_async_context(server)).url)
            seeds = seeds_file(folder, args.seeds)
            found[name] = Totals.of(await asyncio.to_thread(contexts, folder, seeds, urls, settings))
        print(f"{name}: {time.perf_counter() - started:.0f} s, {found[name]}", flush=True)
    _print_sections(args, found)


def _without_end(model: Path) -> str:
    """Return sampling parameters (TOML) with which `model` does not end its answer."""
    config = orjson.loads((model / "config.json").read_bytes())
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    tokens = {config.get(name) for name in names} - {None}
    biases = ", ".join(f'"{token}" = -100.0' for token in sorted(tokens))
    return f"{{logit_bias = {{{biases}}}}}"


def _print_sections(args: argparse.Namespace, found: dict[str, Totals]) -> None:
    print(
        f"\n{args.seeds} seeds, {args.target_tokens} tokens in sections of {args.section_tokens}, 2 servers"
    )
    print(f"{'':18}{'contexts':>9}{'steps':>7}{'written':>9}{'prompts':>9}{'cached':>8}{'uncached':>10}")
    for name, total in found.items():
        share = total.cached / total.tokens
        print(
            f"{name:18}{total.contexts:9}{total.steps:7}{total.written:9}{total.tokens:9}"
            f"{share:8.2f}{total.uncached:10}"
        )
    if len(found) < len(MODES):
        return
    cached, plain = found.values()
    print(f"cached, with the cache      {cached.cached / cached.tokens:6.2f}  (target: {TARGETS['cached']})")
    ratio, target = plain.uncached / cached.uncached, TARGETS["uncached"]
    print(f"computed, without / with    {ratio:6.2f}  (target: {target})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("throughput", help="output tokens a second, compared with bench_serving")
    command.add_argument("--requests", type=int, default=32)
    command.add_argument("--concurrency", type=int, default=16)
    command.add_argument("--max-tokens", type=int, default=96, help="tokens of an answer")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--sequential", type=int, default=8, help="requests sent one at a time")
    command = commands.add_parser("sections", help="prompt tokens computed, with and without the radix cache")
    command.add_argument("--only", choices=MODES, help="only this run")
    command.add_argument("--seeds", type=int, default=8)
    command.add_argument("--target-tokens", type=int, default=3000, help="tokens a context")
    command.add_argument("--section-tokens", type=int, default=430, help="tokens a section")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = {"throughput": throughput, "sections": sections}[args.command]
        asyncio.run(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
