"""Counters of servers from their Prometheus endpoints: the servers' own view of the measured part.

SGLang has one with `--enable-metrics`, vLLM always. A server without one is left out.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import structlog
from prometheus_client.parser import text_string_to_metric_families

from streamsyn.bench.measurement import ServerCounters
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ServerError
from streamsyn.fleet.membership import Connect, connect_http
from streamsyn.fleet.server_spec import server_specs
from streamsyn.fleet.transport import Transport

log = structlog.get_logger()

_PATH: Final = "/metrics"
_TIMEOUT_S: Final = 5.0
_COUNTED: Final = ("counter", "histogram", "summary")


class CounterReader:
    """Reads the counters of all servers. Made by `open_counters`.

    Attributes:
        readings: What was read so far.
    """

    def __init__(self, transports: Mapping[str, Transport], now: Callable[[], float]) -> None:
        self._transports = transports
        self._now = now
        self.readings: list[ServerCounters] = []

    async def read(self) -> None:
        """Read the counters of each server, all at once."""
        async with asyncio.TaskGroup() as group:
            for url, transport in self._transports.items():
                group.create_task(self._read(url, transport), name=f"counters-{url}")

    async def _read(self, url: str, transport: Transport) -> None:
        try:
            reply = await transport.exchange("GET", _PATH, timeout_s=_TIMEOUT_S)
        except ServerError as error:
            log.debug("bench.no_counters", server=url, error=str(error))
            return
        if reply.status != 200:
            log.debug("bench.no_counters", server=url, status=reply.status)
            return
        at = self._now()
        try:
            text = reply.body.decode("utf-8", "replace")
            values = await asyncio.to_thread(parse_counters, text)  # 0.2 s for a real SGLang's
        except ValueError as error:
            log.debug("bench.no_counters", server=url, error=str(error))
            return
        self.readings.append(ServerCounters(server=url, at=at, values=values))


@asynccontextmanager
async def open_counters(
    section: FleetSection, environ: Mapping[str, str], connect: Connect | None, now: Callable[[], float]
) -> AsyncIterator[CounterReader]:
    """Open connections of their own to the configured servers; those that are discovered are left out.

    Args:
        section: The `fleet` section of the configuration.
        environ: Holds the servers' keys.
        connect: Opens a transport to a server; None uses HTTP.
        now: Returns the time of a reading.
    """
    connect = connect or await connect_http(section, environ)
    async with AsyncExitStack() as stack:
        specs = server_specs(section, may_be_empty=True)
        yield CounterReader({spec.url: await stack.enter_async_context(connect(spec)) for spec in specs}, now)


def parse_counters(text: str) -> dict[str, float]:
    """Return the value of each counter, and the sum and count of each histogram, labels summed.

    Args:
        text: The text format of Prometheus, 0.0.4.

    Raises:
        ValueError: It is malformed.
    """
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        if family.type in _COUNTED:
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    found[sample.name] += sample.value
    return dict(found)
