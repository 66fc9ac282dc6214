"""Seeds from an asynchronous iterable, such as a queue, a database or an HTTP stream."""

import asyncio
from collections.abc import AsyncIterator

import streamsyn


async def seeds() -> AsyncIterator[dict[str, str]]:
    """Pairs as they come from elsewhere."""
    for number in range(20):
        await asyncio.sleep(0)  # wait for the next one
        yield {"instruction": f"Who kept lighthouse {number}?", "answer": f"Keeper number {number * 7919}."}


async def main() -> None:
    """Print the length of each sample."""
    async with streamsyn.open_run(out="runs/async", seeds=seeds(), servers=["http://127.0.0.1:30000"]) as run:
        async for sample in run:
            print(sample["seq"], sample["n_tokens"], "tokens")


if __name__ == "__main__":
    asyncio.run(main())
