"""The daemon's page in a real browser."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from streamsyn.simulator.settings import SimulatorConfig
from tests.browser import Page, opened
from tests.daemon.conftest import SERVER, Served, StartDaemon, seed_lines
from tests.report.runs import HOSTILE

pytestmark = pytest.mark.chromium
VIEWS = ((1280, False), (375, False), (1280, True))
"""Width and whether dark."""
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
    if await page.evaluate("typeof axe") == "undefined":
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


async def test_it_shows_what_the_api_says(daemon: Served, page: Page) -> None:
    """It shows runs, servers, samples and rejects, loads nothing else, and axe-core finds no fault."""
    await finished_run(daemon, "books", 6)
    strict = {"checks": {"min_words": 5000}, "recipe": {"tries": 1}, "run": {"max_reject_fraction": 1.0}}
    await finished_run(daemon, "strict", 4, **strict)
    trainer = "/v1/runs/books/consumers/trainer"
    await daemon.ask("PUT", trainer)
    await daemon.ask("POST", f"{trainer}/ack", {"seq": 1, "metrics": {"loss": 1.25, "step": 300}})
    shard = daemon.daemon.root / "runs/books/contexts/part-000000.jsonl"
    context = orjson.loads(shard.read_bytes().splitlines()[-1])
    grounds = []
    await page.open(daemon.url, 1280)
    for width, dark in VIEWS:
        await page.resize(width, dark=dark)
        await page.evaluate("location.hash = '#/'")
        await page.until(shows("runs", "books"))
        assert await page.evaluate(shows("facts", "0 running 2 in total"))
        assert await page.evaluate(shows("servers", f"{SERVER} simulated"))
        assert await page.evaluate(shows("runs", "finished"))
        await assert_good(page, width)
        grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))

        await page.evaluate("location.hash = '#/runs/books'")
        await page.until(shows("reading", "Instruction"))
        await assert_good(page, width)
    assert await page.evaluate(shows("run-facts", "6 contexts, 0 rejects"))
    assert await page.evaluate(shows("reading", " ".join(context["context"].split())[:60]))

    assert await page.evaluate(shows("consumers", "trainer samples 1 4 loss 1.25, step 300"))
    assert await page.evaluate(shows("losses", "Loss of trainer 1.25"))

    await page.evaluate("location.hash = '#/runs/strict'")
    await page.until(shows("rejects", "too short"))
    await page.evaluate("document.querySelector('.reason').open = true")
    await page.until(shows("rejects", "5000"))
    assert await page.evaluate(shows("rejects", "What of 3?"))
    await assert_good(page, 1280)
    assert grounds[0] == grounds[1] != grounds[2]
    assert [] == page.complaints
    assert {daemon.url} == {url[: len(daemon.url)] for url in page.requests}
    await daemon.daemon.drain()


async def test_it_is_used_by_keyboard(daemon: Served, page: Page) -> None:
    """A run is created, paused, resumed and drained, and a server added and drained, without a mouse."""
    await page.open(daemon.url, 1280)
    await page.until(shows("main", "There are no runs yet."))
    await assert_good(page, 1280)
    await page.press("Tab", "Tab", "Tab", "Enter")
    await page.until("document.activeElement.name === 'id'")
    await page.type("typed")
    await page.press("Tab")
    await page.type('{"instruction": "Who?", "answer": "Ada."}\n{"instruction": "Why?"}')
    await page.press("Tab", "Tab", " ", "Tab", "Tab", "Tab", "Enter")
    await page.until(shows("run-dialog", "typed: accepted 1 seed, refused 1 line."))
    assert await page.evaluate(shows("run-dialog", "line 2: "))
    await assert_good(page, 1280)
    await page.press("Escape")
    await page.until("location.hash === '#/runs/typed'")
    await page.until("document.activeElement.id === 'run-title'")
    await page.until(shows("run-state", "running"))

    for state, *keys in (("paused", "Tab"), ("running", "Tab"), ("stopped", "Tab"), ("running", "Shift+Tab")):
        await page.press(*keys, "Enter")
        await page.until(shows("run-state", state))
        assert "run-actions" == await page.evaluate("document.activeElement.parentElement.id")
        run = await daemon.ask("GET", "/v1/runs/typed")
        assert state == run["state"]

    await page.evaluate("location.hash = '#/'")
    await page.until("document.activeElement.id === 'main'")
    await page.evaluate("document.getElementById('add-server').focus()")
    await page.press("Enter")
    await page.until("document.activeElement.name === 'url'")
    await page.type("not a URL")
    await page.press("Enter")
    await page.until("!document.querySelector('#server-dialog .problem').hidden")
    await page.evaluate("document.querySelector('#server-dialog [name=url]').value = ''")
    await page.type("http://gpu-2:30000")
    await page.press("Enter")
    await page.until(shows("servers", "http://gpu-2:30000"))
    await page.evaluate("document.querySelector('#servers button').focus()")
    await page.press("Enter")
    await page.until(shows("servers", "draining"))
    [drained, added] = (await daemon.ask("GET", "/v1/servers"))["data"]
    assert ("draining", "http://gpu-2:30000") == (drained["state"], added["url"])
    await page.press("Enter")  # the button is in the same place, and uses the server again
    await page.until("!" + shows("servers", "draining"))
    assert [] == [one for one in page.complaints if "status of 4" not in one]


async def test_seeds_come_from_a_file(daemon: Served, page: Page, tmp_path: Path) -> None:
    """A run is created from a compressed file of seeds, closed, and read as soon as it has samples."""
    path = tmp_path / "seeds.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(seed_lines(4))))
    await page.open(daemon.url, 1280)
    await page.until(_LIVE)
    await page.evaluate("document.getElementById('new-run').click()")
    await page.type("filed")
    await page.choose("#run-dialog [name=file]", path)
    await page.press("Enter")
    await page.until(shows("said", "filed: accepted 4 seeds."))
    await page.until(shows("run-state", "finished"))
    await page.until(shows("reading", "What of "))
    assert 4 == (await daemon.ask("GET", "/v1/runs/filed"))["counts"]["samples"]
    await daemon.daemon.drain()


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


async def test_hostile_texts_are_shown_and_do_nothing(start_daemon: StartDaemon, page: Page) -> None:
    """Markup, control characters and a megabyte, in seeds, labels and what a model wrote, are text."""
    long = HOSTILE + "word " * 200_000 + "END"
    seed = {"instruction": long, "answer": HOSTILE, "task": HOSTILE, "id": HOSTILE}
    checks = {"qa_pasted": False, "prompt_echo": False, "max_repetition": 1.0}
    config = {"assembly": {"contexts_per_sample": 1}, "checks": checks}
    async with start_daemon(simulator=SimulatorConfig(faithful=1.0, context_tokens=10**7)) as daemon:
        await daemon.new_run("hostile", labels={"note": HOSTILE[:200]}, config=config)
        inbox = await (await daemon.daemon.runs.get("hostile")).inbox()
        assert 1 == (await asyncio.to_thread(inbox.submit, [orjson.dumps(seed)])).accepted
        await daemon.ask("POST", "/v1/runs/hostile/close")
        await daemon.until_state("hostile", "finished")
        await page.open(f"{daemon.url}/#/runs/hostile", 1280)
        await page.until(shows("reading", "</script><img"))
        await page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        await page.until("document.querySelectorAll('.reading .text').length > 4")
        for width in (375, 1280):
            await page.resize(width)
            assert width >= await page.evaluate("document.documentElement.scrollWidth")
            assert [] == await page.evaluate(_TOO_WIDE)
        await page.evaluate("for (let n = 12; n; n--) document.querySelector('.body dl button')?.click()")
        assert await page.evaluate(shows("reading", "word END"))
        assert await page.evaluate(shows("reading", "\\u202e reversed"))
        assert "hostile · streamsyn" == await page.evaluate("document.title")
        assert 0 == await page.evaluate("document.querySelectorAll('img, iframe, body script, style').length")
        assert [] == page.complaints
        await daemon.daemon.drain()


async def test_it_asks_for_a_token(start_daemon: StartDaemon, page: Page, tmp_path: Path) -> None:
    """With tokens the page asks for one, keeps it for the tab, and shows what it does not allow."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"reader read {TOKEN}\n")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with start_daemon({"serve.tokens_file": str(tokens)}, headers=headers) as daemon:
        await page.open(daemon.url, 1280)
        await page.until("document.activeElement.name === 'token'")
        await assert_good(page, 1280)
        await page.press("Escape")
        await page.until(shows("gone", "This daemon asks for a token."))
        await page.evaluate("document.getElementById('gone-try').click()")
        await page.until("document.activeElement.name === 'token'")
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
