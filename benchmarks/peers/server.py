"""The simulator, with a record of which prompts arrived when; every peer is measured at it.

    python -m benchmarks.peers.server [--latency-ms 20] [--words 150] [--busy 0.05]

`GET /asked` returns the record as JSON, `GET /asked?answered=N` once N requests have been answered or a new
record was begun, by `POST /reset`. `busy` is the fraction of requests that get a 503.
"""

import argparse
import asyncio
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from streamsyn.simulator.app import make_app
from streamsyn.simulator.settings import Fault, SimulatorConfig

NUMBER = re.compile(rb"in year (\d+)\?")
"""The number of a seed in its prompt, as `benchmarks.common.seeds_file` writes it."""


@dataclass(slots=True)
class Asked:
    """Requests since the last reset.

    Attributes:
        first_at: When the first one arrived, as `time.time()`; 0 before.
        last_at: When the last one was answered.
        arrived: Requests for each number of a seed.
        answered: Answers with status 200 for each number.
        in_flight: Requests that are being answered.
        most_in_flight: The most at a time.
    """

    first_at: float = 0.0
    last_at: float = 0.0
    arrived: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0

    def as_json(self) -> bytes:
        """The record as JSON."""
        return orjson.dumps(
            {
                "first_at": self.first_at,
                "last_at": self.last_at,
                "arrived": dict(self.arrived),
                "answered": dict(self.answered),
                "most_in_flight": self.most_in_flight,
            },
            option=orjson.OPT_NON_STR_KEYS,
        )


class Record:
    """Keeps the record."""

    def __init__(self) -> None:
        self._asked = Asked()
        self._changed = asyncio.Condition()

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware: note the request, if it is for a chat completion, and its answer."""
        if request.path == "/asked":
            least, asked = int(request.query.get("answered", 0)), self._asked
            async with self._changed:
                await self._changed.wait_for(
                    lambda: asked.answered.total() >= least or asked is not self._asked
                )
            return web.Response(body=asked.as_json(), content_type="application/json")
        if request.path == "/reset":
            self._asked = Asked(in_flight=self._asked.in_flight)
            async with self._changed:
                self._changed.notify_all()
            return web.Response()
        if request.path != "/v1/chat/completions":
            return await handler(request)
        found, asked = NUMBER.search(await request.read()), self._asked
        number = int(found.group(1)) if found else -1
        asked.first_at = asked.first_at or time.time()
        asked.arrived[number] += 1
        self._change(1)
        try:
            answer = await handler(request)
        finally:
            self._change(-1)
        asked.last_at = time.time()
        if answer.status == web.HTTPOk.status_code:
            asked.answered[number] += 1
        async with self._changed:
            self._changed.notify_all()
        return answer

    def _change(self, by: int) -> None:
        asked = self._asked
        asked.in_flight += by
        asked.most_in_flight = max(asked.most_in_flight, asked.in_flight)


async def serve(config: SimulatorConfig) -> None:
    """Serve at a free port, which is printed on stderr, until SIGTERM."""
    app = make_app(config)
    app.middlewares.append(Record().note)
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=config.keep_alive_s
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    host, port = runner.addresses[0][:2]
    sys.stderr.write(f"listening at http://{host}:{port}\n")
    sys.stderr.flush()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--busy", type=float, default=0.0)
    args = parser.parse_args()
    faults = {str(Fault.QUEUE_FULL): args.busy} if args.busy else {}
    config = SimulatorConfig(latency_ms=args.latency_ms, words=args.words, slots=4096, faults=faults)
    asyncio.run(serve(config))


if __name__ == "__main__":
    main()
