"""A fleet of one simulated server for scoring."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from streamsyn.config.sections import FleetSection
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.scoring.measures import AnswerPrompt, Question
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import Script, SimulatorConfig

QUESTION = Question("Who keeps the lighthouse of Velmora?", "Keeper Amund Tarn keeps it.", "narrativeqa")
HELPS = (
    "The coast is long and cold. In every month of the year Keeper Amund Tarn keeps the lighthouse of "
    "Velmora, and nobody visits him. The ferry calls at other ports."
)
UNRELATED = (
    "Sourdough rises slowly. Bakers in the valley add salt on the second day, and bake before dawn when "
    "ovens are hottest. Rye wants more water."
)
PROMPT = AnswerPrompt()
QUICK: dict[str, Any] = {"backoff_base_s": 0.001, "backoff_max_s": 0.002, "request_timeout_s": 5.0}


@asynccontextmanager
async def fleet_at(
    script: Script = (), config: dict[str, Any] | None = None, **section: Any
) -> AsyncIterator[tuple[Fleet, RunningSimulator]]:
    """A fleet of one simulated server, ready for requests."""
    async with asyncio.timeout(20), running(SimulatorConfig(**config or {}), script=script) as server:
        settings = FleetSection.model_validate({"servers": [server.url], **QUICK, **section})
        async with open_fleet(settings, lambda _: None) as fleet:
            await fleet.ask_models()
            yield fleet, server
