"""Reuse of shared prefixes: streamsyn's placement compared with simpler policies and with a router.

    python -m benchmarks.prefix [--servers 2 8] [--concurrency 16 64 256] [--check]

40 groups of 25 requests in random order share a template of 4,000 characters; each group shares 1,500 more,
and each request ends with 60 of its own. `concurrency` workers send them to simulated servers with empty
caches, one request at a time each. Variants:

- streamsyn: its fleet, as `streamsyn run` uses it;
- round robin, least in flight: the same HTTP client with only that policy;
- smg, POLICY: the same HTTP client through the Shepherd gateway, once sglang-router, with each of its
  policies for equal servers; those that follow keys are sent the key of the group;
- streamsyn, ranks unknown: as streamsyn, but servers with data-parallel ranks (`--dp-size`) do not say that
  they have them, and give requests to them in turns;
- streamsyn + smg, manual: the fleet with the gateway as its only server, which follows the routing key.

Columns:

- cached: prompt tokens from a cache, as the servers counted them;
- of ideal: cached tokens / the most possible: every server computes the template once, and one server the
  text of each group once;
- computed: prompt tokens computed / the fewest possible;
- of plan: cached tokens / those that streamsyn expected to be cached;
- split: share of the groups whose text is in more than one server's cache afterwards (each server is sent a
  request of each group to find out);
- max/mean: requests at the busiest server / the mean;
- moves: how often streamsyn moved a group to a different server.

With --check the exit code is 1 when streamsyn misses a target: 0.95 of plan, 5 % split, 1.25 max/mean, or
when a request fails.
"""

import argparse
import asyncio
import itertools
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import aiohttp

from benchmarks.common import Simulator
from benchmarks.grouped import TEMPLATE_CHARS, Work, work
from benchmarks.router import router
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ServerError
from streamsyn.fleet import wire
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.membership import Connect, connect_http
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport, http_transport
from streamsyn.records import Attempt, Completion, Request
from streamsyn.telemetry import configure_logs

MODEL = "simulated"
KEYED = ("manual", "consistent_hashing")
"""The gateway's policies that follow a routing key."""
POLICIES = ("cache_aware", "prefix_hash", *KEYED, "power_of_two", "least_load", "round_robin")
LEAST_OF_PLAN, MOST_SPLIT, MOST_LOAD = 0.95, 0.05, 1.25
"""The targets: lowest share of the plan, highest share of split groups, highest max/mean load."""
PROBES = 32
"""Concurrent requests when a server's cache is probed."""

Ask: TypeAlias = Callable[[Request], Awaitable[Completion]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of one variant. `planned` (cached tokens) and `moves` are None without placement."""

    completions: list[Completion]
    failed: int
    seconds: float
    planned: float | None = None
    moves: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one variant; the module docstring defines the columns."""

    variant: str
    servers: int
    concurrency: int
    cached_tokens: int
    of_ideal: float
    computed: float
    of_plan: float | None
    split: float
    load: float
    """Max/mean."""
    requests_per_s: float
    failed: int
    moves: int | None

    def misses(self) -> list[str]:
        """Return the names of the targets that the variant misses."""
        met = {
            "cached of plan": (self.of_plan or 0) >= LEAST_OF_PLAN,
            "groups split": self.split <= MOST_SPLIT,
            "max/mean load": self.load <= MOST_LOAD,
            "requests failed": not self.failed,
        }
        return [name for name, is_met in met.items() if not is_met]


async def closed_loop(requests: Sequence[Request], concurrency: int, ask: Ask) -> Answers:
    """Send all requests with `ask`, `concurrency` at a time; each worker waits for its answer."""
    remaining, completions, failed = iter(requests), list[Completion](), 0

    async def worker() -> None:
        nonlocal failed
        for request in remaining:
            try:
                completions.append(await ask(request))
            except ServerError:
                failed += 1

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return Answers(completions, failed, time.perf_counter() - started)


async def with_streamsyn(
    urls: Sequence[str], requests: Sequence[Request], concurrency: int, cap: str, *, ranks: bool = True
) -> Answers:
    """Send the requests through a streamsyn fleet.

    `cap` is the in-flight cap of a server: "auto", a number, or "even" for `concurrency` / number of servers.
    Without `ranks` it does not learn of data-parallel ranks.
    """
    even = -(-concurrency // len(urls))
    section = FleetSection(
        servers=tuple(urls), concurrency="auto" if cap == "auto" else even if cap == "even" else int(cap)
    )
    connect = None if ranks else without_info(await connect_http(section, {}))
    async with open_fleet(section, on_gone=lambda _: None, connect=connect) as fleet:
        await fleet.ask_models()

        async def ask(request: Request) -> Completion:
            attempts: list[Attempt] = []
            return await fleet.complete(request, attempts)

        answers = await closed_loop(requests, concurrency, ask)
        planned = sum(server.planned_cached_tokens for server in fleet.servers)
        moves = fleet.moves
        return replace(answers, planned=planned, moves=moves)


class NoInfo:
    """A transport to a server that has no `/server_info`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def exchange(self, method: str, path: str, **given: Any) -> Reply:
        """See Transport."""
        if path == wire.SERVER_INFO:
            return Reply(404, b"")
        return await self._transport.exchange(method, path, **given)


def without_info(connect: Connect) -> Connect:
    """Return what opens transports to servers that have no `/server_info`."""

    @asynccontextmanager
    async def opened(spec: ServerSpec) -> AsyncIterator[Transport]:
        async with connect(spec) as transport:
            yield NoInfo(transport)

    return opened


async def without_placement(
    urls: Sequence[str],
    requests: Sequence[Request],
    concurrency: int,
    *,
    least_in_flight: bool = False,
    keyed: bool = False,
) -> Answers:
    """Send the requests round robin or to the server with the least in flight.

    The same HTTP client as streamsyn's, without prefix warm-up or in-flight caps, and without prefix keys
    unless `keyed`.
    """
    turns, rids = itertools.cycle(range(len(urls))), itertools.count()
    in_flight: Counter[int] = Counter()
    async with clients(urls) as servers:

        async def ask(request: Request) -> Completion:
            number = next(turns)
            if least_in_flight:
                number = min(range(len(servers)), key=lambda index: in_flight[index])
            in_flight[number] += 1
            try:
                sent = request if keyed else Request(request.messages, request.sampling)
                return await servers[number].chat(sent, MODEL, f"plain-{next(rids):08x}")
            finally:
                in_flight[number] -= 1

        return await closed_loop(requests, concurrency, ask)


@asynccontextmanager
async def clients(urls: Sequence[str]) -> AsyncIterator[list[ServerClient]]:
    """Context manager: one client with its own connections for each server."""
    async with AsyncExitStack() as stack:
        yield [
            ServerClient(url, await stack.enter_async_context(http_transport(url, {})), 600.0) for url in urls
        ]


async def reset(urls: Sequence[str]) -> None:
    """Empty the caches and counters of the simulated servers."""
    async with aiohttp.ClientSession() as session:
        for url in urls:
            async with session.post(f"{url}/simulator/reset") as answer:
                answer.raise_for_status()


async def requests_at(urls: Sequence[str]) -> list[int]:
    """Return the number of requests to each server since its reset."""
    counts = []
    async with aiohttp.ClientSession() as session:
        for url in urls:
            async with session.get(f"{url}/simulator/stats") as answer:
                counts.append((await answer.json())["requests"])
    return counts


async def holders(urls: Sequence[str], workload: Work) -> list[int]:
    """Return for each group the number of servers with its text in their cache."""
    held: Counter[str] = Counter()
    async with clients(urls) as servers:
        for server in servers:

            async def ask(probe: Request, server: ServerClient = server) -> Completion:
                completion = await server.chat(replace(probe, group=""), MODEL, f"probe-{probe.group}")
                held[probe.group] += completion.cached_tokens > workload.template_tokens
                return completion

            answers = await closed_loop(workload.probes, PROBES, ask)
            if answers.failed:
                raise RuntimeError(f"{answers.failed} requests to probe the cache of {server.url} failed")
    return [held[probe.group] for probe in workload.probes]


async def measure(
    variant: str, urls: Sequence[str], workload: Work, concurrency: int, args: argparse.Namespace
) -> Row:
    """Run one variant on empty caches and return its row."""
    await reset(urls)
    match variant:
        case "streamsyn":
            answers = await with_streamsyn(urls, workload.requests, concurrency, args.cap)
        case "streamsyn, ranks unknown":
            answers = await with_streamsyn(urls, workload.requests, concurrency, args.cap, ranks=False)
        case "round robin" | "least in flight":
            least = variant == "least in flight"
            answers = await without_placement(urls, workload.requests, concurrency, least_in_flight=least)
        case "streamsyn + smg, manual":
            async with router(urls, "--policy", "manual", "--assignment-mode", "min_group") as url:
                answers = await with_streamsyn([url], workload.requests, concurrency, args.cap)
        case _:
            policy = variant.removeprefix("smg, ")
            async with router(urls, "--policy", policy) as url:
                answers = await without_placement(
                    [url], workload.requests, concurrency, keyed=policy in KEYED
                )
    counts = await requests_at(urls)
    split = [number > 1 for number in await holders(urls, workload)]
    cached = sum(completion.cached_tokens for completion in answers.completions)
    prompts = sum(completion.prompt_tokens for completion in answers.completions)
    ideal = workload.ideal(len(urls) * args.dp_size)
    return Row(
        variant=variant,
        servers=len(urls),
        concurrency=concurrency,
        cached_tokens=cached,
        of_ideal=round(cached / ideal, 4),
        computed=round((prompts - cached) / (prompts - ideal), 3),
        of_plan=answers.planned and round(cached / answers.planned, 4),
        split=sum(split) / len(split),
        load=round(max(counts) * len(counts) / max(1, sum(counts)), 3),
        requests_per_s=round(len(answers.completions) / answers.seconds, 1),
        failed=answers.failed,
        moves=answers.moves,
    )


def show(row: Row) -> None:
    of_plan = "" if row.of_plan is None else f"{row.of_plan:.3f}"
    moves = "" if row.moves is None else str(row.moves)
    print(
        f"{row.servers:7}{row.concurrency:6}  {row.variant:26}{row.cached_tokens:10}"
        f"{row.of_ideal:9.3f}{row.computed:9.2f}{of_plan:>9}{row.split:8.1%}{row.load:10.2f}"
        f"{row.requests_per_s:11.0f}{row.failed:8}{moves:>7}",
        flush=True,
    )


@contextmanager
def _simulators(number: int, options: Sequence[str]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Simulator(*options, "--seed", str(index))) for index in range(number)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--groups", type=int, default=40, help="prefix groups")
    parser.add_argument("--per-group", type=int, default=25, help="requests a group")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--cost-model", default="h100", help="cost model of the simulators")
    parser.add_argument(
        "--cap", default="auto", help="streamsyn's in-flight cap of a server: auto, even or a number"
    )
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="only variants whose names start with NAME"
    )
    parser.add_argument("--dp-size", type=int, default=1, help="data-parallel ranks of a server")
    parser.add_argument("--check", action="store_true", help="exit with 1 when streamsyn misses a target")
    return parser.parse_args()


def variants(args: argparse.Namespace) -> list[str]:
    """Return the selected variants."""
    unknown = ["streamsyn, ranks unknown"] if args.dp_size > 1 else []
    names = [
        "streamsyn",
        *unknown,
        "round robin",
        "least in flight",
        *(f"smg, {policy}" for policy in POLICIES),
    ]
    names += ["streamsyn + smg, manual"]
    wanted = args.variants or [""]
    return [name for name in names if any(name.startswith(start) for start in wanted)]


def main() -> int:
    args = arguments()
    configure_logs(as_json=False, level=logging.WARNING)
    workload, rows = work(args.groups, args.per_group, args.max_tokens), list[Row]()
    print(
        f"{args.groups} groups x {args.per_group} requests, template {TEMPLATE_CHARS} characters, "
        f"cost model {args.cost_model}, answers of {args.max_tokens} tokens, cap {args.cap}"
    )
    print(
        f"{'servers':>7}{'conc':>6}  {'variant':26}{'cached':>10}{'of ideal':>9}{'computed':>9}"
        f"{'of plan':>9}{'split':>8}{'max/mean':>10}{'requests/s':>11}{'failed':>8}{'moves':>7}"
    )
    for servers in args.servers:
        options = ["--cost-model", args.cost_model, "--dp-size", str(args.dp_size)]
        with _simulators(servers, options) as urls:
            for concurrency, variant in itertools.product(args.concurrency, variants(args)):
                rows.append(asyncio.run(measure(variant, urls, workload, concurrency, args)))
                show(rows[-1])
    print(json.dumps({"benchmark": "prefix", "rows": [asdict(row) for row in rows]}))
    missed = [(row, row.misses()) for row in rows if row.variant == "streamsyn" and row.misses()]
    for row, names in missed:
        print(
            f"target missed by streamsyn with {row.servers} servers, concurrency {row.concurrency}: "
            f"{', '.join(names)}",
            file=sys.stderr,
        )
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
