"""The floor: a bare aiohttp loop that drops the answers."""

import asyncio

import aiohttp
from common import MAX_TOKENS, MODEL, Job, parse


async def ask_all(job: Job) -> None:
    """Send all prompts, `job.concurrency` at a time, and decode the answers."""
    route, prompts = f"{job.url}/v1/chat/completions", job.texts()

    async def worker() -> None:
        for prompt in prompts:
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": MAX_TOKENS,
            }
            async with session.post(route, json=body) as response:
                (await response.json())["choices"][0]["message"]["content"]

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for _ in range(job.concurrency):
            group.create_task(worker())


if __name__ == "__main__":
    asyncio.run(ask_all(parse()))
