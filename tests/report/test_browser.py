"""The report page in a real browser."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from streamsyn.report.page import write_report
from tests.browser import Page, opened
from tests.report.runs import HOSTILE, good_run, rejected, sample_of, scored, written

pytestmark = pytest.mark.chromium
WIDTHS = (1280, 400)
_OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"
_TOO_WIDE = """[...document.querySelectorAll('body *')].filter(one =>
    !one.closest('.scroll') && !one.closest('svg') && one.getClientRects().length > 0 &&
    (one.getBoundingClientRect().right > innerWidth + 1 || one.getBoundingClientRect().left < -1)
).map(one => one.tagName + '.' + one.className).slice(0, 5)"""


async def assert_fits(page: Page, width: int) -> None:
    """Assert that nothing is wider than the window, with all details open."""
    await page.evaluate(_OPEN_ALL)

    assert width >= await page.evaluate("document.documentElement.scrollWidth")
    assert [] == await page.evaluate(_TOO_WIDE)


def assert_not_blank(png: bytes) -> None:
    """Assert that a picture has many colours, and none that fills nearly all of it."""
    from PIL import Image

    colours = Image.open(BytesIO(png)).convert("RGB").getcolors(1 << 24)

    assert colours is not None
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.98 * sum(count for count, _ in colours)


@pytest.fixture
def good_url(tmp_path: Path) -> str:
    """The URL of the report on a good run."""
    path = tmp_path / "report.html"
    write_report(good_run(tmp_path / "run"), path)
    return path.as_uri()


@pytest.fixture
def hostile_url(tmp_path: Path) -> str:
    """The URL of the report on a run with hostile texts."""
    hostile: dict[str, Any] = dict.fromkeys(
        ("instruction", "answer", "context", "task", "model", "server"), HOSTILE
    )
    checks = {"near_duplicate": {"id": HOSTILE, "similarity": 0.9}, "model_answer": HOSTILE}
    context = scored(1, gain=-1.0, score=0.0, checks=checks, flags=["near_duplicate", HOSTILE], **hostile)
    reject = rejected(2, detail=HOSTILE, instruction=HOSTILE, task=HOSTILE)
    path = tmp_path / "report.html"
    write_report(written(tmp_path / "run", [context, reject], [sample_of(context, 0, [HOSTILE])]), path)
    return path.as_uri()


@pytest.fixture
def bad_url(tmp_path: Path) -> str:
    """The URL of a page that does everything a report must not."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><body><p style='width:3000px'>x</p><img src='http://elsewhere.test/x.png'>"
        "<script>console.error('ouch')</script>"
    )
    return path.as_uri()


async def test_a_report_in_a_browser(tmp_path: Path, good_url: str) -> None:
    """Sections are visible, nothing is requested, logged or too wide, in light and dark mode."""
    async with opened(tmp_path / "profile") as page:
        grounds = []
        for width, dark in ((1280, False), (400, False), (1280, True)):
            await page.open(good_url, width, dark=dark)
            heights = await page.evaluate(
                "[...document.querySelectorAll('section')].map(one => one.getBoundingClientRect().height)"
            )
            top = await page.evaluate("document.querySelector('.verdict strong').getBoundingClientRect().top")
            grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert_not_blank(await page.screenshot(width, 1200))
            await assert_fits(page, width)

            assert 9 == len(heights)
            assert min(heights) > 40
            assert top < 120, "the verdict is what is seen first"
            assert "Fit for training" == await page.evaluate(
                "document.querySelector('.verdict strong').textContent"
            )
    assert [] == page.complaints
    assert {good_url} == set(page.requests)
    assert grounds[0] == grounds[1] != grounds[2]


async def test_hostile_texts_in_a_browser(tmp_path: Path, hostile_url: str) -> None:
    """Texts that try to run, load, hide or overflow are shown and do nothing."""
    async with opened(tmp_path / "profile") as page:
        for width in WIDTHS:
            await page.open(hostile_url, width)
            await assert_fits(page, width)

            assert "run: Not fit for training" == await page.evaluate("document.title")
            assert 0 == await page.evaluate("document.querySelectorAll('script, img, iframe').length")
            assert await page.evaluate("document.body.innerText.includes('<script>')")
            assert 300 < await page.evaluate("document.body.getBoundingClientRect().height")
    assert [] == page.complaints
    assert {hostile_url} == set(page.requests)


async def test_the_browser_checks_find_faults(tmp_path: Path, bad_url: str) -> None:
    """The checks above detect errors, requests and overflow."""
    async with opened(tmp_path / "profile") as page:
        await page.open(bad_url, 400)

        assert 400 < await page.evaluate("document.documentElement.scrollWidth")
        assert ["P."] == await page.evaluate(_TOO_WIDE)
    assert any("ouch" in one for one in page.complaints)
    assert "http://elsewhere.test/x.png" in page.requests
