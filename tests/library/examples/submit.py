"""Seeds that are submitted while the run goes on, and outcomes as they come."""

import asyncio

import streamsyn


async def submit(run: streamsyn.Run) -> None:
    """Submit seeds in portions; each is on disk when `submit` returns."""
    for portion in range(3):
        seeds = [
            {"instruction": f"Who kept lighthouse {number}?", "answer": f"Keeper number {number * 7919}."}
            for number in range(portion * 10, portion * 10 + 10)
        ]
        submitted = await run.submit(seeds)
        print(
            f"{submitted.accepted} accepted, {submitted.duplicate} known, {submitted.refused_total} refused"
        )
    await run.close_seeds()  # otherwise the run waits for more


async def main() -> None:
    """Submit and read at once."""
    async with (
        streamsyn.open_run(out="runs/submit", servers=["http://127.0.0.1:30000"], keep_open=True) as run,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(submit(run), name="submit")
        async for outcome in run.outcomes():
            if "reason" in outcome:
                print("rejected:", outcome["origin"], outcome["reason"])
            else:
                print("written:", outcome["seed_id"], outcome["checks"]["words"], "words")


if __name__ == "__main__":
    asyncio.run(main())
