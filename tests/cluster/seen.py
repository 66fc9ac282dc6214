"""What a run over placed servers logs, and which requests it sends: with times, and to be waited for."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from structlog.testing import capture_logs

import streamsyn
from streamsyn.errors import ConfigError
from streamsyn.fleet.transport import HttpTransport, Reply
from streamsyn.pipeline.verify import verify
from streamsyn.sink.manifest import Manifest
from tests.builders import rows

_WAIT_S = 180.0


@dataclass
class Sent:
    """A request for an answer."""

    at: float
    server: str
    refused: bool = False
    """Whether no connection could be made: no server got it."""


@dataclass
class Seen:
    """The log entries, each with its time as `at`, and the requests."""

    entries: list[Any] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def stamp(self, _logger: Any, _method: str, entry: structlog.typing.EventDict) -> Any:
        """A processor of structlog."""
        with self._changed:
            entry["at"] = time.monotonic()
            self.entries.append(entry)
            self._changed.notify_all()
        return entry

    def of(self, event: str, **fields: Any) -> list[Any]:
        """The entries of an event with these fields."""
        found = [entry for entry in list(self.entries) if entry["event"] == event]
        return [entry for entry in found if fields.items() <= entry.items()]

    def until(self, holds: Callable[["Seen"], bool]) -> None:
        """Wait until something holds; for a thread of its own."""
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), _WAIT_S)

    @property
    def alive(self) -> int:
        """How many servers are ready."""
        return len(self.of("cluster.server_ready")) - len(self.of("cluster.server_lost", was_ready=True))

    def lost_urls(self) -> list[str]:
        """The URL of each server that was lost, in this order."""
        urls: dict[str, str] = {}
        found = []
        for entry in list(self.entries):
            if entry["event"] == "cluster.server_ready":
                urls[entry["name"]] = entry["server"]
            elif entry["event"] == "cluster.server_lost" and entry["was_ready"]:
                found.append(urls[entry["name"]])
        return found

    def repeated(self, outcomes: int) -> int:
        """How many requests servers got beyond one for each outcome."""
        return sum(not request.refused for request in self.sent) - outcomes

    def after_death(self, deaths: Sequence[float]) -> list[float]:
        """For each server that was lost, the seconds from its death to the last request sent there."""
        last = {request.server: request.at for request in self.sent}
        return [
            round(max(0.0, last[url] - died), 2) for url, died in zip(self.lost_urls(), deaths, strict=True)
        ]

    def sent_to_ghosts(self) -> list[Sent]:
        """The requests that were sent to servers after the fleet had been told of their death."""
        removed = {url: entry["at"] for entry in self.of("fleet.servers_changed") for url in entry["removed"]}
        return [one for one in self.sent if one.at > removed.get(one.server, one.at)]


@contextmanager
def watched() -> Iterator[Seen]:
    """Watch the runs of this process."""
    seen = Seen()
    once = HttpTransport._once

    async def noted(self: HttpTransport, method: str, path: str, *given: Any) -> Reply:
        if not path.endswith("/completions"):
            return await once(self, method, path, *given)
        request = Sent(time.monotonic(), self._url)
        seen.sent.append(request)
        try:
            return await once(self, method, path, *given)
        except aiohttp.ClientConnectorError:
            request.refused = True
            raise

    with pytest.MonkeyPatch.context() as patch, capture_logs(processors=[seen.stamp]):
        patch.setattr(HttpTransport, "_once", noted)
        yield seen


def check_guarantees(out: Path, ids: Sequence[str]) -> None:
    """G1 to G4 by counting, then by `verify`, which assembles the log again; G6 by another configuration."""
    contexts, rejects, samples = (rows(out, kind) for kind in ("contexts", "rejects", "samples"))
    assert Counter(ids) == Counter(row["seed_id"] for row in [*contexts, *rejects])
    for found in (contexts, rejects, samples):
        assert list(range(len(found))) == [row["seq"] for row in found]
    assert sorted(row["seed_id"] for row in contexts) == sorted(row["seed_id"] for row in samples)
    sealed = Manifest(out / "manifest.jsonl").shards
    assert sealed
    for shard in sealed:
        assert shard.sha256 == hashlib.sha256((out / shard.path).read_bytes()).hexdigest()
    problems, _ = verify(out)
    assert [] == problems
    with pytest.raises(ConfigError, match=r"recipe\.target_words"):
        streamsyn.run_sync(out=out, overrides={"recipe.target_words": 77})
