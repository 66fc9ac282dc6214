"""Named consumers of a run: up to which row each has acknowledged, kept in the run's consumers.json.

A change is on disk before its answer is sent. Changes that arrive while the file is being written share the
next write.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from streamsyn.daemon.bodies import JsonBody
from streamsyn.daemon.problems import Problem
from streamsyn.errors import SinkError
from streamsyn.io.durable import write_whole

MAX_CONSUMERS = 1000
"""Consumers of one run: every acknowledgement writes all of them."""
_FORMAT = 1


class ConsumerState(JsonBody):
    """A consumer as the API shows it.

    `acked` is null before its first acknowledgement; `lag` is the number of rows not acknowledged yet;
    `metrics` are the last ones that it reported, such as the loss of a training; absent before that.
    """

    name: str
    kind: str
    acked: int | None
    lag: int
    metrics: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A named consumer.

    Attributes:
        kind: The kind of rows that it reads.
        acked: The `seq` of the last row that it has acknowledged; -1 before the first.
        created_at: When it was made, in Unix seconds.
        acked_at: When it last moved forward, in Unix seconds; None before that.
        metrics: The last metrics that it reported.
    """

    kind: str
    acked: int
    created_at: float
    acked_at: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def lag(self, rows: int) -> int:
        """Rows that it has not acknowledged, of `rows` in all."""
        return max(0, rows - 1 - self.acked)

    def as_json(self, name: str, rows: int) -> dict[str, Any]:
        """It as the API shows it; `rows` is the number of rows of its kind."""
        acked = None if self.acked < 0 else self.acked
        shown = {"name": name, "kind": self.kind, "acked": acked, "lag": self.lag(rows)}
        return shown | ({"metrics": dict(self.metrics)} if self.metrics else {})


class Consumers:
    """The consumers of one run. For one event loop; the file is read and written in threads.

    Args:
        path: The run's consumers.json.

    Raises (all coroutines):
        Problem: The consumer does not exist, or the change is not allowed.
        SinkError: The file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._consumers: dict[str, Consumer] | None = None
        self._saving = asyncio.Lock()
        self._changes = self._saved = 0
        """Numbers of changes made, and of those on disk."""
        self._file_lock = threading.Lock()
        """Held while the file is written: a request that is cancelled leaves its thread behind."""

    def shown(self, rows: Mapping[str, int]) -> list[dict[str, Any]]:
        """The consumers as the API shows them; none before they were read for the first time.

        Args:
            rows: Number of rows of each kind.
        """
        return [one.as_json(name, rows[one.kind]) for name, one in (self._consumers or {}).items()]

    async def all(self) -> dict[str, Consumer]:
        """All consumers by name, in the order in which they were made."""
        if self._consumers is None:
            found = await asyncio.to_thread(_read, self._path)
            if self._consumers is None:  # otherwise a concurrent caller was faster, and may have changed some
                self._consumers = found
        return self._consumers

    async def get(self, name: str) -> Consumer:
        """The consumer of this name."""
        consumers = await self.all()
        if name not in consumers:
            raise Problem(404, f"there is no consumer {name!r}; create it with PUT .../consumers/{name}")
        return consumers[name]

    async def put(self, name: str, kind: str, after: int | None, rows: int) -> tuple[Consumer, bool]:
        """Create a consumer; one that exists is left as it is.

        Args:
            name: Its name.
            kind: The kind of rows that it reads.
            after: The `seq` of the last row that it needs no more; None begins with the first row.
            rows: Number of rows of this kind.

        Returns:
            The consumer, and whether it is new.
        """
        consumers = await self.all()
        if (consumer := consumers.get(name)) is not None:
            if consumer.kind != kind:
                raise Problem(409, f"consumer {name!r} reads {consumer.kind}, not {kind}: choose a new name")
            await self.save()  # it may be new, and not on disk yet
            return consumer, False
        if len(consumers) >= MAX_CONSUMERS:
            raise Problem(409, f"the run has {MAX_CONSUMERS} consumers, the most allowed: delete one first")
        acked = -1 if after is None else after
        _refuse_beyond(acked, kind, rows)
        consumer = Consumer(kind=kind, acked=acked, created_at=time.time())
        await self._change(name, consumer)
        return consumer, True

    async def ack(
        self, name: str, seq: int, rows: int, metrics: Mapping[str, float] | None = None
    ) -> Consumer:
        """Acknowledge all rows up to and including `seq`; a consumer never moves back.

        Args:
            name: The consumer.
            seq: The row.
            rows: Number of rows of the consumer's kind.
            metrics: What it reports of its work; None leaves what it reported before.
        """
        consumer = await self.get(name)
        _refuse_beyond(seq, consumer.kind, rows)
        metrics = consumer.metrics if metrics is None else metrics
        if seq > consumer.acked:
            consumer = replace(consumer, acked=seq, acked_at=time.time(), metrics=metrics)
            await self._change(name, consumer)
        elif metrics != consumer.metrics:
            consumer = replace(consumer, metrics=metrics)
            await self._change(name, consumer)
        else:
            await self.save()  # the acknowledgement that it repeats may not be on disk yet
        return consumer

    async def delete(self, name: str) -> None:
        """Delete a consumer."""
        await self.get(name)
        await self._change(name, None)

    async def slowest(self, kind: str) -> int | None:
        """The last row that all consumers of a kind have acknowledged, on disk; None: there are none."""
        consumers = await self.all()
        await self.save()
        return min((one.acked for one in consumers.values() if one.kind == kind), default=None)

    async def save(self) -> None:
        """Return once all changes made so far are on disk."""
        wanted = self._changes
        async with self._saving:
            if self._saved < wanted:
                self._saved = max(self._saved, await asyncio.to_thread(self._write))

    async def _change(self, name: str, consumer: Consumer | None) -> None:
        consumers = await self.all()
        if consumer is None:
            consumers.pop(name, None)
        else:
            consumers[name] = consumer
        self._changes += 1
        await self.save()

    def _write(self) -> int:
        """Write the file; returns the number of changes in it."""
        with self._file_lock:
            changes = self._changes
            consumers = dict(self._consumers or {})
            data = {name: asdict(consumer) for name, consumer in consumers.items()}
            write_whole(self._path, orjson.dumps({"format": _FORMAT, "consumers": data}))
            return changes


def _refuse_beyond(seq: int, kind: str, rows: int) -> None:
    if seq >= rows:
        last = f"the last row is {rows - 1}" if rows else "there are no rows yet"
        raise Problem(409, f"seq {seq} of {kind} does not exist: {last}")


def _read(path: Path) -> dict[str, Consumer]:
    try:
        data = orjson.loads(path.read_bytes())
        if data["format"] != _FORMAT:
            raise SinkError(f"{path} has format {data['format']!r}; this streamsyn reads format {_FORMAT}")
        return {name: Consumer(**consumer) for name, consumer in data["consumers"].items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SinkError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise SinkError(f"{path} is damaged: {error}; delete it to begin without consumers") from error
