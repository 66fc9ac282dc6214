"""Timelines: faults and outages at given times of a simulated server, from a TOML file.

    [[event]]
    at_s = 60              # seconds after the server's start
    speed = 0.5            # half as fast from here on
    [[event]]
    at_s = 120
    every_s = 90           # repeats; without it, the event happens once
    down_s = 30            # down this long: connections reset, then refused; the prefix cache is lost
    [[event]]
    at_s = 300
    faults = {http_500 = 0.1}    # these rates from here on replace all earlier ones
    [[event]]
    at_s = 600
    die = true             # dead for good

An event has `at_s` and at least one of `speed`, `down_s`, `faults` and `die`.
"""

import asyncio
import heapq
import math
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

from streamsyn.background import background
from streamsyn.errors import ConfigError
from streamsyn.simulator.settings import check_rates
from streamsyn.simulator.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Event:
    """What happens at `at_s`, and every `every_s` seconds after that."""

    at_s: float
    every_s: float | None = None
    speed: float | None = None
    """1.0 is nominal, 0.5 half as fast."""
    down_s: float | None = None
    faults: Mapping[str, float] | None = None
    die: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of bounds, or the event has no effect.
        """
        if self.at_s < 0:
            raise ConfigError(f"at_s must be at least 0, not {self.at_s:g}")
        for name in ("every_s", "speed", "down_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value:g}")
        if self.speed is None and self.down_s is None and self.faults is None and not self.die:
            raise ConfigError("the event has no effect: set speed, down_s, faults or die = true")
        if self.every_s is not None and self.down_s is not None and self.down_s >= self.every_s:
            raise ConfigError(f"down_s must be less than every_s = {self.every_s:g}, not {self.down_s:g}")
        check_rates(self.faults or {})


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the server's state; None means unchanged."""

    at_s: float
    speed: float | None = None
    faults: Mapping[str, float] | None = None
    down: bool | None = None
    die: bool = False


class Listener(Protocol):
    """Accepts a server's connections."""

    async def open(self) -> None: ...
    def close(self) -> None: ...


class Timeline:
    """A schedule of events in a server's life."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def changes(self) -> Iterator[Change]:
        """Yield all changes in order of time; endless if an event repeats.

        Outages that touch or overlap are one outage. Nothing follows `die`.
        """
        # Entries are (time, whether an outage ends, number of the event).
        due = [(event.at_s, False, number) for number, event in enumerate(self._events)]
        heapq.heapify(due)
        outages = 0
        while due:
            at_s, is_end, number = heapq.heappop(due)
            event = self._events[number]
            if is_end:
                outages -= 1
                if outages == 0:
                    yield Change(at_s, down=False)
                continue
            if event.every_s is not None:
                heapq.heappush(due, (at_s + event.every_s, False, number))
            if event.down_s is not None:
                heapq.heappush(due, (at_s + event.down_s, True, number))
                outages += 1
            goes_down = True if event.down_s is not None and outages == 1 else None
            yield Change(at_s, event.speed, event.faults, goes_down, event.die)
            if event.die:
                return

    async def play(self, simulation: Simulation, listener: Listener | None = None) -> None:
        """Apply all changes to `simulation`, starting now. Return after the last one.

        Raises:
            ConfigError: The listener cannot be opened again.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        for change in self.changes():
            await asyncio.sleep(started + change.at_s - loop.time())
            if simulation.dead:
                return
            if change.speed is not None:
                simulation.speed = change.speed
            if change.faults is not None:
                simulation.faults.set_rates(change.faults)
            if change.down is True:
                if listener is not None:
                    listener.close()
                simulation.go_down()
            elif change.down is False:
                simulation.come_up()
                if listener is not None:
                    await listener.open()
            if change.die:
                simulation.die()


@asynccontextmanager
async def playing(
    timeline: Timeline | None, simulation: Simulation, listener: Listener | None = None
) -> AsyncIterator[None]:
    """Play `timeline`, if there is one, until the end of the block; errors are then raised in a group."""
    if timeline is None:
        yield
        return
    async with background() as tasks:
        tasks.start(timeline.play(simulation, listener), name="timeline")
        yield


_NUMBERS: Final = frozenset({"at_s", "every_s", "speed", "down_s"})


_KEYS: Final = tuple(field.name for field in fields(Event))


def load_timeline(path: Path) -> Timeline:
    """Return the timeline in a TOML file.

    Raises:
        ConfigError: It cannot be read, or an event is invalid; the message names the file and the event.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the timeline {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    entries = tree.pop("event", [])
    if tree:
        raise ConfigError(f"{path}: unknown key {next(iter(tree))}; a timeline is a list of [[event]]")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: event must be a list of tables, each under [[event]]")
    events = []
    for number, entry in enumerate(entries, 1):
        try:
            events.append(_event(entry))
        except ConfigError as error:
            raise ConfigError(f"{path}: event {number}: {error}") from None
    return Timeline(events)


def _event(entry: dict[str, Any]) -> Event:
    if "at_s" not in entry:
        raise ConfigError("at_s is missing")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ConfigError(f"unknown key {key}; known keys are {', '.join(_KEYS)}")
        if key in _NUMBERS and not _is_number(value):
            raise ConfigError(f"{key} must be a number, not {value!r}")
    if not isinstance(entry.get("die", False), bool):
        raise ConfigError(f"die must be true or false, not {entry['die']!r}")
    faults = entry.get("faults", {})
    if not isinstance(faults, dict) or not all(_is_number(rate) for rate in faults.values()):
        raise ConfigError(f"faults must be a table of rates, as in {{http_500 = 0.1}}, not {faults!r}")
    return Event(**entry)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
