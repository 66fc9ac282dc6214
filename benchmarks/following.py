"""Rows per second of CPU of `streamsyn.follow`, of a directory and of a daemon on the other core.

python -m benchmarks.following
"""

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import orjson

from benchmarks.daemon_streams import make_root, served
from streamsyn.following.follow import follow

TRIES = 3


def main() -> None:
    os.sched_setaffinity(0, {0})
    print(f"{'bytes a row':>12}{'':>22}{'rows/s':>10}{'MB/s':>8}{'to json':>9}")
    for row_bytes, rows in ((4096, 20_000), (36_000, 5000)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make_root(root, rows, row_bytes)
            run = root / "runs" / "r"
            plain = report(
                row_bytes,
                {
                    "json.loads": partial(decoded, json.loads, run),
                    "orjson.loads": partial(decoded, orjson.loads, run),
                    "follow(DIR)": partial(followed, run),
                    "follow(DIR), async": partial(followed_async, run),
                },
                rows,
            )
            with served(root) as (_, port):
                url = f"http://127.0.0.1:{port}/v1/runs/r"
                ways = {
                    "follow(URL)": partial(followed, url),
                    "follow(URL), async": partial(followed_async, url),
                }
                report(row_bytes, ways, rows, plain)


def report(row_bytes: int, ways: Mapping[str, Callable[[], int]], rows: int, plain: float = 0.0) -> float:
    """Print the best rate of each way; returns that of the first."""
    for name, read in ways.items():
        times = []
        for _ in range(TRIES):
            began = time.process_time()
            assert read() == rows
            times.append(time.process_time() - began)
        rate = rows / min(times)
        plain = plain or rate
        print(
            f"{row_bytes:12,}{name:>22}{rate:10,.0f}{rate * row_bytes / 1e6:8,.0f}{rate / plain:9.2f}",
            flush=True,
        )
    return plain


def decoded(decode: Callable[[bytes], object], run: Path) -> int:
    """Decode the lines of all shards; returns their number."""
    count = 0
    for path in sorted((run / "samples").iterdir()):
        with path.open("rb") as file:
            for line in file:
                decode(line)
                count += 1
    return count


def followed(source: Path | str) -> int:
    """The number of rows, read without a loop."""
    return sum(1 for _ in follow(source))


def followed_async(source: Path | str) -> int:
    """The number of rows, read in an event loop."""

    async def read() -> int:
        count = 0
        async for _ in follow(source):
            count += 1
        return count

    return asyncio.run(read())


if __name__ == "__main__":
    main()
