"""The report in a real browser: Chromium, headless, offline.

`make test` leaves these tests out where there is no Chromium, and says so; in CI they fail there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.pages import write_data_page, write_full, write_wide

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PAPER = {"width": 703, "height": 1000}  # A4 between margins of 12 mm
# Relative luminance and contrast of two CSS colours, as WCAG 2.2 defines them.
CONTRAST = """([selector, behind]) => {
  const channels = (element, property) => getComputedStyle(document.querySelector(element))[property].match(/[\\d.]+/g);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = rgb => rgb.slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const [a, b] = [light(channels(selector, 'color')), light(channels(behind, 'backgroundColor'))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
BROKEN_IMAGES = "() => [...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length"
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is on PATH; `apt-get install chromium` on Debian"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def data_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "summary.html"
    write_data_page(path)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_full(path)
    return path


def open_page(browser: Browser, path: Path, viewport: dict, **emulated: str) -> tuple[Page, list[str]]:
    """The page, and what was said on its console or asked of the network while it loaded."""
    context = browser.new_context(viewport=viewport, offline=True, **emulated)
    page, noise = context.new_page(), []
    page.on("console", lambda message: noise.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: noise.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith("data:") or request.url == path.as_uri()
            else noise.append(f"request: {request.url}")
        ),
    )
    page.goto(path.as_uri(), wait_until="load")
    return page, noise


def faults(browser: Browser, path: Path, viewport: dict) -> list[str]:
    """Everything that is wrong with a page at a size of the window."""
    page, noise = open_page(browser, path, viewport)
    broken, overflow = page.evaluate(BROKEN_IMAGES), page.evaluate(OVERFLOW)
    page.context.close()
    if broken:
        noise.append(f"{broken} broken images")
    return [*noise, "wider than the window"] if overflow > 0 else noise


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wrong_with_the_page(browser: Browser, report: Path, viewport: dict) -> None:
    assert faults(browser, report, viewport) == []
    page, _ = open_page(browser, report, viewport)
    assert page.evaluate("document.images.length") == 14
    assert page.locator("svg").count() == 5
    assert [heading.inner_text() for heading in page.locator("h2").all()] == [
        "Scores", "Models compared", "Layers", "Training", "Retrieval, looked at", "False captions that won",
        "Captions side by side", "Times", "Data and models", "Reproduce",
    ]  # fmt: skip
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    page.context.close()


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wrong_with_the_page_about_data(browser: Browser, data_page: Path, viewport: dict) -> None:
    assert faults(browser, data_page, viewport) == []
    for scheme in ("light", "dark"):
        page, _ = open_page(browser, data_page, viewport, color_scheme=scheme)
        assert page.locator("svg").count() == 4
        for text, behind in (("body", "body"), ("p.soft", "body"), (".highlight .soft", ".highlight")):
            assert page.evaluate(CONTRAST, [text, behind]) >= 4.5, f"{text} on {behind}, {scheme}"
        for link in page.locator("nav a").all():
            assert page.locator(link.get_attribute("href")).count() == 1
        page.context.close()


def test_the_widest_tables_fit_screen_and_paper(browser: Browser, tmp_path: Path) -> None:
    write_wide(tmp_path / "wide.html")
    assert faults(browser, tmp_path / "wide.html", PHONE) == []
    page, _ = open_page(browser, tmp_path / "wide.html", PAPER)
    assert page.locator("th[colspan]").count() > 100
    page.emulate_media(media="print")
    assert page.evaluate(OVERFLOW) <= 0
    page.context.close()


def test_a_page_with_faults_is_caught(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<img src="data:image/png;base64,AAAA"><img src="https://example.invalid/x.png">'
        '<div style="width: 2000px">.</div>'
        '<script>console.error("oh"); undefined.x</script>'
    )
    found = " ".join(faults(browser, tmp_path / "bad.html", PHONE))
    for fault in ("console error: oh", "error: Cannot read", "request: https://example", "2 broken", "wider than"):
        assert fault in found


def test_dark_and_light_differ_and_both_can_be_read(browser: Browser, report: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page, _ = open_page(browser, report, DESKTOP, color_scheme=scheme)
        look = "() => [document.body, document.querySelector('svg rect')].map(e => getComputedStyle(e))"
        colours[scheme] = page.evaluate(f"({look})().map((s, i) => i ? s.fill : s.backgroundColor + s.color)")
        for text, behind in (
            ("body", "body"),
            ("p.soft", "body"),
            (".good", ".card"),
            (".bad", ".card"),
            ("dt", ".card"),
        ):
            assert page.evaluate(CONTRAST, [text, behind]) >= 4.5, f"{text} on {behind}, {scheme}"
        page.context.close()
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"], strict=True))


def test_printed_pages_are_light(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report, DESKTOP, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflow") == "visible"
    page.set_viewport_size(PAPER)
    assert page.evaluate(OVERFLOW) <= 0
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.context.close()
