"""CPU time a request on a simulator: `streamsyn run` compared with a bare aiohttp loop.

    python -m benchmarks.overhead [--requests 4000] [--concurrency 256] [--latency-ms 20] [--rounds 3]

The loop is the obvious one: `session.post(url, json=...)` and `await response.json()` with prompts of the
same size, and the answers are dropped. A second loop uses orjson. streamsyn reads seeds, renders prompts,
retries, checks, logs every context durably and assembles samples, with n = 1 and n = 10. Start-up does not
count: CPU time a request is the difference between a long and a short run, divided by the difference in
requests.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

import aiohttp
import orjson

from benchmarks.common import Cost, Simulator, measured, run_measured, seeds_file

SHORT = 256
VARIANTS = {
    "bare aiohttp loop": ["--codec", "json"],
    "bare loop with orjson": ["--codec", "orjson"],
    "streamsyn, contexts only": ["--set", "assembly.write=false"],
    "streamsyn, n = 1": ["--set", "assembly.contexts_per_sample=1"],
    "streamsyn, n = 10": ["--set", "assembly.contexts_per_sample=10"],
}


async def bare(url: str, requests: int, concurrency: int, codec: str) -> None:
    """Send `requests` chat requests, `concurrency` at a time, and decode the answers."""
    route, numbers = f"{url}/v1/chat/completions", iter(range(requests))

    def body(number: int) -> dict[str, object]:
        prompt = f"{number} " + "You write documents. " * 95 + "Question: who? Answer: somebody."
        return {"model": "simulated", "messages": [{"role": "user", "content": prompt}], "max_tokens": 4096}

    async def with_json(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            async with session.post(route, json=body(number)) as response:
                (await response.json())["choices"][0]["message"]["content"]

    async def with_orjson(session: aiohttp.ClientSession) -> None:
        headers = {"Content-Type": "application/json"}
        for number in numbers:
            async with session.post(route, data=orjson.dumps(body(number)), headers=headers) as response:
                orjson.loads(await response.read())["choices"][0]["message"]["content"]

    worker = {"json": with_json, "orjson": with_orjson}[codec]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker(session))


def measure(url: str, options: list[str], requests: int, concurrency: int, folder: Path) -> Cost:
    """Measure one process that sends `requests` requests: the loop or streamsyn."""
    if "--codec" in options:
        command = [sys.executable, "-m", "benchmarks.overhead", "--bare", url, *options]
        return measured([*command, "--requests", str(requests), "--concurrency", str(concurrency)])
    out = tempfile.mkdtemp(dir=folder)
    command = ["run", "--seeds", str(seeds_file(folder, requests)), "--out", out, "--server", url]
    return run_measured(*command, "--set", f"fleet.concurrency={concurrency}", "--no-progress", *options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=4000, help="requests of a long run (more than 256)")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--words", type=int, default=150, help="words a context")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--codec", choices=["json", "orjson"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        asyncio.run(bare(args.bare, args.requests, args.concurrency, args.codec))
        return
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rate: dict[str, list[float]] = {name: [] for name in VARIANTS}
    simulator = Simulator("--latency-ms", str(args.latency_ms), "--words", str(args.words), "--slots", "4096")
    with tempfile.TemporaryDirectory() as folder, simulator as url:
        for _ in range(args.rounds):
            for name, options in VARIANTS.items():
                short = measure(url, options, SHORT, args.concurrency, Path(folder))
                long = measure(url, options, args.requests, args.concurrency, Path(folder))
                more = args.requests - SHORT
                cpu[name].append((long.cpu_s - short.cpu_s) / more * 1000)
                rate[name].append(more / (long.wall_s - short.wall_s))
    load = f"{args.requests} requests, concurrency {args.concurrency}, {args.latency_ms:g} ms"
    print(f"{load}, {args.words} words, median of {args.rounds} rounds")
    print(f"{'':28}{'CPU ms/request':>16}{'vs. bare':>10}{'requests/s':>13}")
    base = next(iter(VARIANTS))
    for name in VARIANTS:
        ratio = statistics.median(mine / bare for mine, bare in zip(cpu[name], cpu[base], strict=True))
        print(
            f"{name:28}{statistics.median(cpu[name]):16.3f}{ratio:10.2f}{statistics.median(rate[name]):13.0f}"
        )


if __name__ == "__main__":
    main()
