"""The daemon's page in a real browser."""

from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import Page, opened
from tests.daemon.conftest import Served, StartDaemon

pytestmark = pytest.mark.chromium
TOKEN = "correct-horse-battery"
_TOO_WIDE = """[...document.querySelectorAll('body *')].filter(one =>
    !one.closest('pre, svg, .unseen, thead, .skip') && one.getClientRects().length > 0 &&
    (one.getBoundingClientRect().right > innerWidth + 1 || one.getBoundingClientRect().left < -1)
).map(one => one.tagName + '.' + one.className).slice(0, 5)"""
_TEXT = "document.getElementById({!r}).innerText"
_LIVE = "document.getElementById('connection-text').textContent.startsWith('live')"


@pytest_asyncio.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    """A browser's tab."""
    async with opened(tmp_path / "profile") as tab:
        yield tab


def shows(part: str, text: str) -> str:
    """An expression: a part of the page shows a text."""
    return f"{_TEXT.format(part)}.replace(/\\s+/g, ' ').includes({text!r})"


async def violations(page: Page) -> list[str]:
    """The rules of axe-core that the page breaks as it is now, each with the elements."""
    await page.evaluate((files("axe_core_python") / "axe.min.js").read_text("utf-8") + "; 0")
    found: list[dict[str, Any]] = await page.evaluate(
        "axe.run({resultTypes: ['violations']}).then(({violations}) => violations.map("
        "({id, nodes}) => ({id, at: nodes.map(({html}) => html.slice(0, 200)).slice(0, 3)})))"
    )
    return [f"{one['id']}: {one['at']}" for one in found]


async def assert_good(page: Page, width: int) -> None:
    """Assert that axe-core finds nothing, and that nothing is wider than the window."""
    assert [] == await violations(page)
    assert width >= await page.evaluate("document.documentElement.scrollWidth")
    assert [] == await page.evaluate(_TOO_WIDE)


async def finished_run(daemon: Served, run_id: str, seeds: int, **config: Any) -> None:
    """Create a run, and wait until each of its seeds has its outcome."""
    await daemon.new_run(run_id, config=config)
    await daemon.submit(run_id, seeds)
    await daemon.ask("POST", f"/v1/runs/{run_id}/close")
    await daemon.until_state(run_id, "finished")


async def test_it_is_honest_when_the_daemon_is_gone(start_daemon: StartDaemon, page: Page) -> None:
    """What is shown is marked as old, with its time; when the daemon is back, the page is as well."""
    async with start_daemon() as served:
        await finished_run(served, "books", 2)
        port = served.url.rpartition(":")[2]
        await page.open(served.url, 1280)
        await page.until(shows("runs", "books"))
        await served.daemon.drain()
    await page.until(shows("gone", "Last heard from at"))
    assert await page.evaluate(shows("runs-title", "Runs as of "))
    assert await page.evaluate("document.title.startsWith('No answer')")
    assert await page.evaluate(shows("runs", "books")), "the old values are still there to read"
    await assert_good(page, 1280)

    async with start_daemon({"serve.listen": f"127.0.0.1:{port}"}) as again:
        await page.evaluate("document.getElementById('gone-try').click()")
        await page.until(_LIVE)
        assert await page.evaluate("document.getElementById('gone').hidden")
        assert not await page.evaluate(shows("runs-title", "as of"))
        await again.daemon.drain()


async def test_it_asks_for_a_token(start_daemon: StartDaemon, page: Page, tmp_path: Path) -> None:
    """With tokens the page asks for one, keeps it for the tab, and shows what it does not allow."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"reader read {TOKEN}\n")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with start_daemon({"serve.tokens_file": str(tokens)}, headers=headers) as daemon:
        await page.open(daemon.url, 1280)
        await page.until("document.activeElement.name === 'token'")
        await assert_good(page, 1280)
        await page.type("a wrong one")
        await page.press("Enter")
        await page.until(shows("token-dialog", "no spaces"))
        await page.evaluate("document.querySelector('[name=token]').value = ''")
        await page.type("a-wrong-one")
        await page.press("Enter")
        await page.until(shows("token-dialog", "refused this token"))
        await page.type(TOKEN)
        await page.press("Enter")
        await page.until(_LIVE)
        assert TOKEN not in "".join(page.requests)

        await page.evaluate("document.getElementById('first-run').click()")
        await page.press("Enter")
        await page.until(shows("run-dialog", "the scope read"))
        await page.open(daemon.url, 1280)
        await page.until(_LIVE)
        await page.loaded_by("Runtime.evaluate", expression="document.getElementById('forget').click()")
        await page.until("document.getElementById('token-dialog').open")
        assert 0 == await page.evaluate("sessionStorage.length")
