"""Samples as they are written, handed to something slow; killed at any moment, it goes on where it was."""

import asyncio
import json
from pathlib import Path
from typing import Any

import streamsyn

TAKEN = Path("taken.jsonl")


def last_taken() -> int | None:
    """The `seq` of the last sample in TAKEN; None before the first."""
    lines = TAKEN.read_text().splitlines() if TAKEN.exists() else []
    return json.loads(lines[-1])["seq"] if lines else None


def take(sample: dict[str, Any]) -> None:
    """Deal with a sample; this may take its time."""
    with TAKEN.open("a") as file:
        file.write(json.dumps(sample) + "\n")


async def main() -> None:
    """Take samples until every seed has its outcome."""
    async with streamsyn.open_run(
        {"assembly": {"contexts_per_sample": 2}},
        out="runs/stream",
        seeds="pairs.jsonl",
        servers=["http://127.0.0.1:30000"],
        after=last_taken(),
    ) as run:
        async for sample in run:  # not asking for the next sample slows the run down
            take(sample)
    print(f"{run.summary.samples} samples; rejects: {run.status().reasons or 'none'}")


if __name__ == "__main__":
    asyncio.run(main())
