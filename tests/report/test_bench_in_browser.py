"""The page of a benchmark in a real browser."""

from pathlib import Path

import pytest

from streamsyn.bench.bench_page import bench_page
from streamsyn.bench.series import Benchmark
from tests.bench.measured import measurement
from tests.browser import opened
from tests.report.runs import HOSTILE

pytestmark = pytest.mark.chromium


@pytest.fixture
def hostile_url(tmp_path: Path) -> str:
    """The URL of a page with hostile names of servers and models."""
    hostile = measurement(models=[HOSTILE])
    for one in hostile.ticks:
        for server in one.servers:
            object.__setattr__(server, "server", HOSTILE + server.server)
    path = tmp_path / "bench.html"
    path.write_bytes(bench_page(Benchmark(kind="repeats", runs=[hostile], asked={})))
    return path.as_uri()


async def test_the_page_in_a_browser(tmp_path: Path, hostile_url: str) -> None:
    """Hostile names of servers and models do nothing; nothing is too wide, requested or logged."""
    async with opened(tmp_path / "profile") as page:
        grounds = []
        for width, dark in ((1280, False), (375, False), (375, True)):
            await page.open(hostile_url, width, dark=dark)
            grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))

            assert width >= await page.evaluate("document.documentElement.scrollWidth")
            assert 0 == await page.evaluate("document.querySelectorAll('script, img, iframe').length")
    assert [] == page.complaints
    assert {hostile_url} == set(page.requests)
    assert grounds[0] == grounds[1] != grounds[2]
