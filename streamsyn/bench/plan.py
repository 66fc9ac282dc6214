"""Planning a fleet before it is rented: `--simulate 64xh100` measures simulated servers, then extrapolates.

A run of N drafts ramps up, goes on at the rate of the steady state, and drains. What is written while it
ramps up and drains, and how long both take, comes from the same measurement:

    seconds = ramp + (N - drafts of ramp and drain) / drafts per second of the steady state + drain

Fewer drafts than that are simulated once more, to the end. Of a large fleet a sample of servers can be
simulated (`64xh100:sample=8`): servers are equal, so each takes as long for its part of the drafts.

The fleet is simulated by the cost models of `simulator/costs.py`. The plan names assumptions and sources.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import DraftRecord, Interval, Measurement
from streamsyn.config.sections import RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.simulator import costs
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation

TOKENS_A_WORD: Final = 4 / 3
_WORDS_SOURCE: Final = "https://help.openai.com/en/articles/4936856: 100 tokens are about 75 English words"
_SIMULATED_TOKENS_A_WORD: Final = 1.773
"""Of the simulator's texts, whose tokens have four characters."""
_WARM_UP_DRAFTS, _WINDOW_DRAFTS = 2.0, 4.0
"""Warm-up and window of a plan, in median durations of a draft: drafts of many steps all begin with short
prompts. A measurement that is clearly shorter is repeated."""
_LONG_ENOUGH: Final = 2 / 3
"""Share of them that is enough: a measurement knows requests, and a draft also waits for its place."""
_FILLED: Final = 0.95
"""Length of a simulated section, as a share of the longest one that is asked for."""
_FORM: Final = re.compile(r"(?P<servers>[1-9]\d{0,4})x(?P<model>[^:]+)(?::(?P<settings>.*))?\Z", re.DOTALL)
_EXAMPLE: Final = "64xh100, or 8xh100:words=1500,cache_tokens=0"
_SAMPLE: Final = "sample"
_SETTINGS: Final = (
    "words",
    "slots",
    "queue_limit",
    "schedule_policy",
    "max_prefill_tokens",
    "chunked_prefill_size",
    "speed",
    "cache_tokens",
    "context_tokens",
    "seed",
    _SAMPLE,
)
"""Keys of `SimulatorConfig` that may be set, and the number of servers that are simulated."""


@dataclass(frozen=True, slots=True)
class Assumption:
    """Something that a plan rests on: what, its value, and where the value comes from."""

    what: str
    value: str
    source: str


@dataclass(frozen=True, slots=True)
class SimulatedFleet:
    """Equal simulated servers, and what is assumed about them; `sampled` of them are simulated."""

    servers: int
    sampled: int
    config: SimulatorConfig
    assumptions: Sequence[Assumption]

    @property
    def urls(self) -> list[str]:
        """The URLs of the servers."""
        return [f"http://{self.config.cost_model}-{number:03}:30000" for number in range(self.sampled)]

    @property
    def share(self) -> float:
        """The share of the servers that is simulated."""
        return self.sampled / self.servers

    def start(self) -> InProcessServers:
        """Return new servers in this process."""
        return InProcessServers({url: Simulation(self.config) for url in self.urls})


def simulated_fleet(asked: str, recipe: RecipeSection | None) -> SimulatedFleet:
    """Return the fleet that `--simulate` asks for, as `64xh100` or `64xh100:key=value,...`.

    Args:
        asked: The value of the option.
        recipe: By default answers are as long as it asks for; None for those of a replay.

    Raises:
        ConfigError: The value is invalid.
    """
    found = _FORM.match(asked)
    if found is None:
        raise ConfigError(f"--simulate {asked}: expected NUMBERxMODEL, such as {_EXAMPLE}")
    name = found["model"]
    if name not in costs.PRESETS:
        raise ConfigError(f"--simulate {asked}: no cost model {name!r}; choose {' or '.join(costs.PRESETS)}")
    given = _settings(asked, found["settings"])
    servers = int(found["servers"])
    sampled = given.pop(_SAMPLE, servers)
    if not 1 <= sampled <= servers:
        raise ConfigError(f"--simulate {asked}: {_SAMPLE} must be from 1 to {servers}, not {sampled}")
    words, length = _answer_length(recipe)
    if "words" in given:
        length = Assumption("length of an answer", f"{given['words']} simulated words", "--simulate")
    try:
        config = SimulatorConfig(cost_model=name, **{"words": words, **given})
    except ConfigError as error:
        raise ConfigError(f"--simulate {asked}: {error}") from None
    model = costs.PRESETS[name]
    assumptions = [
        Assumption("speed of a server", f"cost model {name}", model.source),
        length,
        Assumption("tokens of a prompt", "one for four characters", _WORDS_SOURCE),
        Assumption("answers", "all pass the checks; no server fails", "the simulator"),
    ]
    others = ", ".join(f"{key} = {value}" for key, value in given.items() if key != "words")
    if others:
        assumptions.append(Assumption("settings of a server", others, "--simulate"))
    if sampled < servers:
        value = f"{sampled} of {servers} servers are simulated, with their part of the contexts"
        assumptions.append(Assumption("sample", value, "--simulate; what was measured is theirs"))
    return SimulatedFleet(servers, sampled, config, assumptions)


def _settings(asked: str, settings: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for setting in settings.split(",") if settings else ():
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in _SETTINGS:
            near = difflib.get_close_matches(key, _SETTINGS, n=1, cutoff=0)
            raise ConfigError(f"--simulate {asked}: unknown setting {key!r}; the nearest is {near[0]!r}")
        given[key] = value if key == "schedule_policy" else _number(asked, key, value)
    return given


def _number(asked: str, key: str, value: str) -> float:
    try:
        return float(value) if key == "speed" else int(value)
    except ValueError:
        raise ConfigError(f"--simulate {asked}: {key} must be a number, not {value!r}") from None


def _answer_length(recipe: RecipeSection | None) -> tuple[int, Assumption]:
    """Return the words of a simulated answer, and the assumption behind them."""
    if recipe is None:
        return 1, Assumption("length of an answer", "as in the recorded run", "--replay")
    if recipe.use == "sections":
        tokens = _FILLED * recipe.section_tokens
        value = f"{tokens:.0f} tokens a section"
        source = f"{_FILLED:.0%} of recipe.section_tokens = {recipe.section_tokens}"
    else:
        tokens = min(TOKENS_A_WORD * recipe.target_words, recipe.max_tokens)
        value = f"{tokens:.0f} tokens"
        source = f"recipe.target_words = {recipe.target_words}; {_WORDS_SOURCE}"
    words = max(1, round(tokens / _SIMULATED_TOKENS_A_WORD))
    return words, Assumption("length of an answer", value, source)


@dataclass(frozen=True, slots=True)
class Price:
    """Price of a GPU for an hour, and where it was found."""

    a_gpu_hour: float
    source: str


def parse_price(asked: str) -> Price:
    """Return the price of `--price`, as `2.50` or `2.50 (https://...)`.

    Raises:
        ConfigError: It is not a number.
    """
    number, _, source = asked.strip().partition(" ")
    try:
        price = float(number.removeprefix("$"))
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise ConfigError(f"--price {asked}: expected dollars for a GPU and hour, such as 2.50")
    return Price(price, source.strip().removeprefix("(").removesuffix(")") or "--price")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a set of seeds takes on a simulated fleet.

    Attributes:
        drafts: Contexts to write.
        gpus: GPUs of the fleet.
        drafts_per_s: Rate of the steady state; without one, of the whole time.
        ramp_s: Seconds until the steady state; None without one: the fleet is never full.
        drain_s: Seconds from the last draft that is begun to the end.
        seconds: The whole time.
        price: Price of a GPU hour; None if none was given.
        assumptions: What the plan rests on.
    """

    drafts: int
    gpus: int
    drafts_per_s: float
    ramp_s: float | None
    drain_s: float
    seconds: float
    price: Price | None
    assumptions: Sequence[Assumption]

    @property
    def gpu_hours(self) -> float:
        """GPU hours, since every GPU is rented for the whole time."""
        return self.gpus * self.seconds / 3600

    @property
    def cost(self) -> float | None:
        """Dollars for them; None without a price."""
        return None if self.price is None else self.gpu_hours * self.price.a_gpu_hour

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "drafts": self.drafts,
            "gpus": self.gpus,
            "drafts_per_s": self.drafts_per_s,
            "ramp_s": self.ramp_s,
            "drain_s": self.drain_s,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "price_a_gpu_hour": None if self.price is None else self.price.a_gpu_hour,
            "cost": self.cost,
            "assumptions": [
                {"what": one.what, "value": one.value, "source": one.source} for one in self.assumptions
            ],
        }

    def lines(self) -> list[str]:
        """Return the plan for a terminal."""
        cost = "" if self.cost is None else f", ${self.cost:,.2f}"
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus:,} GPUs"
        whole = f"{_duration(self.seconds)}, {_figures(self.gpu_hours)} GPU hours{cost}"
        rate, drain = f"{_figures(self.drafts_per_s)} contexts/s", f"drain {self.drain_s:,.0f} s"
        if self.ramp_s is None:
            rate += " over the whole time, simulated to the end"
        else:
            rate += f" in the steady state; ramp {self.ramp_s:,.0f} s, {drain}"
        return [
            f"{self.drafts:,} contexts on {gpus}: {whole}",
            f"  {rate}",
            "  assumed:",
            *(f"    {one.what}: {one.value} ({one.source})" for one in self.assumptions),
        ]


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= length:
            return f"{_figures(seconds / length)} {unit}"
    return f"{seconds:.0f} seconds"


def _figures(value: float) -> str:
    """A number with three significant digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plan(
    asked: RunToMeasure,
    measured: Measurement,
    drafts: int,
    assumptions: Sequence[Assumption],
    price: Price | None,
    share: float = 1.0,
) -> Plan | None:
    """Return the plan for `drafts` drafts; None if the simulation was stopped.

    Args:
        asked: The measurement that was asked for.
        measured: The measurement, with its warm-up and its drain.
        drafts: Contexts to write for the seeds of the configuration.
        assumptions: What the simulation assumes.
        price: Price of a GPU hour, if known.
        share: Share of the fleet's servers that is simulated.
    """
    found = _of_simulated(asked, measured, max(1, round(share * drafts)), assumptions, price)
    if found is None or share == 1:
        return found
    return replace(
        found, drafts=drafts, gpus=round(found.gpus / share), drafts_per_s=found.drafts_per_s / share
    )


def _of_simulated(
    asked: RunToMeasure,
    measured: Measurement,
    drafts: int,
    assumptions: Sequence[Assumption],
    price: Price | None,
) -> Plan | None:
    """Return the plan of the servers that are simulated."""
    if price is not None:
        value = f"${price.a_gpu_hour:.2f} a GPU hour"
        assumptions = [*assumptions, Assumption("price", value, price.source)]
    if not measured.is_complete:
        return None
    if asked.replay is not None:
        return simulated_whole(measured, drafts, price, assumptions)
    quiet = replace(asked, limit_s=math.inf, on_phase=lambda _: None)
    draft_s = _median_draft_s(measured)
    drafts_long = min(measured.window.seconds / _WINDOW_DRAFTS, measured.window.begins_at / _WARM_UP_DRAFTS)
    if drafts_long < _LONG_ENOUGH * draft_s:
        warmup_s, duration_s = _WARM_UP_DRAFTS * draft_s, _WINDOW_DRAFTS * draft_s
        load = replace(asked.load, warmup_s=warmup_s, duration_s=duration_s)
        measured = measure(replace(quiet, load=load))
    found = extrapolated(measured, drafts, price, assumptions)
    if found is None:
        load, config = replace(asked.load, duration_s=None), asked.config
        limit = math.ceil(drafts / config.recipe.contexts_per_seed)
        seeds = config.seeds.model_copy(update={"limit": limit})
        config = config.model_copy(update={"seeds": seeds})
        whole = measure(replace(quiet, once=True, load=load, config=config))
        found = simulated_whole(whole, drafts, price, assumptions) if whole.is_complete else None
    return found


def _median_draft_s(measured: Measurement) -> float:
    seconds = [one.ended_at - one.begun_at for one in measured.drafts if one.ended_at is not None]
    return median(seconds) if seconds else 0.0


def extrapolated(
    measured: Measurement, drafts: int, price: Price | None, assumptions: Sequence[Assumption]
) -> Plan | None:
    """Return the plan by the steady state; None if the drafts are too few to reach it."""
    window, ramp, drain = measured.window, Interval(0.0, measured.window.begins_at), measured.drain
    within = [_drafts_within(measured.drafts, interval) for interval in (window, ramp, drain)]
    if window.seconds <= 0 or within[0] <= 0 or drafts <= within[1] + within[2]:
        return None
    rate = within[0] / window.seconds
    seconds = ramp.seconds + (drafts - within[1] - within[2]) / rate + drain.seconds
    return Plan(drafts, measured.gpus, rate, ramp.seconds, drain.seconds, seconds, price, assumptions)


def simulated_whole(
    whole: Measurement, drafts: int, price: Price | None, assumptions: Sequence[Assumption]
) -> Plan:
    """Return the plan of a simulation of all drafts, to the end."""
    seconds = whole.drain.ends_at
    rate = drafts / seconds if seconds else 0.0
    return Plan(drafts, whole.gpus, rate, None, whole.drain.seconds, seconds, price, assumptions)


def _drafts_within(drafts: Sequence[DraftRecord], interval: Interval) -> float:
    """Return how many drafts were written in an interval; each counts by the share of its time in it."""
    total = 0.0
    for draft in drafts:
        if draft.ended_at is None or draft.outcome == "unfinished":
            continue
        lasted = draft.ended_at - draft.begun_at
        overlap = min(draft.ended_at, interval.ends_at) - max(draft.begun_at, interval.begins_at)
        total += max(0.0, overlap) / lasted if lasted > 0 else interval.holds(draft.ended_at)
    return total
