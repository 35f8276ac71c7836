"""The page at / in a real browser, on a real server: searches, captions, errors, a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.wire import ADAPTER, CAPTIONS, KEY, STRICT, encode, noise_image

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
LOADED = "() => [...document.images].filter(image => image.complete && image.naturalWidth > 0).length"
ANSWER_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is on PATH; `apt-get install chromium` on Debian"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    """The page, open; an error on its console fails the test."""
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.set_default_timeout(ANSWER_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server)
    expect(page.locator("#models")).to_contain_text(ADAPTER, timeout=ANSWER_MS)
    yield page
    context.close()
    assert not complaints


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of the index."""
    file = tmp_path_factory.mktemp("images") / "third.png"
    file.write_bytes(encode(noise_image(3)))
    return file


def test_search_by_text_by_image_and_by_both(page: Page, image_file: Path) -> None:
    page.keyboard.press("/")
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    cards = page.locator("#hits li")
    expect(cards).to_have_count(len(CAPTIONS), timeout=ANSWER_MS)
    page.fill("#search input[type=text]", "")
    page.set_input_files("#search input[type=file]", image_file)
    page.click("#search button[type=submit]")
    expect(page.locator("#hits .asked")).to_have_attribute("alt", "searched: third.png")
    expect(cards.first).to_contain_text(CAPTIONS[3], timeout=ANSWER_MS)
    expect(cards.first).to_contain_text("similarity 1.000")
    page.wait_for_function(f"({LOADED})() === {len(CAPTIONS) + 1}")  # a thumbnail of each hit, and what was searched
    page.fill("#search input[type=text]", "a red circle")
    page.click("#search button[type=submit]")
    expect(page.locator("#hits h3").first).to_have_text("a red circle")
    expect(cards).to_have_count(len(CAPTIONS), timeout=ANSWER_MS)
    expect(page.locator("#history li")).to_have_count(3)
    page.click("#history li:last-child button")
    expect(page.locator("#hits h3").first).to_have_text("a red circle")
    expect(page.locator("#hits .asked")).to_have_count(0)


def test_adapter_off_and_on_answer_side_by_side(page: Page, image_file: Path) -> None:
    page.set_input_files("#caption input[type=file]", image_file)
    page.click("#caption button[type=submit]")
    page.click("#caption button[type=submit]")  # again at once: the first run's words go nowhere
    columns = page.locator("#answer .answers section")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false", timeout=ANSWER_MS)
    expect(columns).to_have_count(2)
    expect(columns.nth(0)).to_contain_text("tiny, adapter off")
    expect(columns.nth(1)).to_contain_text(f"{ADAPTER}, adapter on")
    once = [columns.nth(i).locator(".words").inner_text() for i in range(2)]
    assert all(once)
    assert once[0] != once[1]
    page.click("#caption button[type=submit]")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false", timeout=ANSWER_MS)
    assert page.locator("#history li").count() >= 2  # 3 where the first run was done before the second click
    assert [columns.nth(i).locator(".words").inner_text() for i in range(2)] == once


def test_errors_are_sentences(page: Page, tmp_path: Path) -> None:
    alert = page.locator("#hits [role=alert]")
    page.click("#search button[type=submit]")
    expect(alert).to_have_text("Type what to look for, or choose an image.")
    broken = tmp_path / "broken.png"
    broken.write_bytes(encode(noise_image(1))[:40])
    page.set_input_files("#search input[type=file]", broken)
    page.click("#search button[type=submit]")
    expect(alert).to_contain_text("query: the image is corrupt", timeout=ANSWER_MS)
    page.context.set_offline(True)
    page.click("#search button[type=submit]")
    expect(alert).to_have_text("The server cannot be reached. Is it still running?")


def test_a_run_can_be_cancelled(page: Page) -> None:
    page.route("**/v1/search", lambda route: None)  # never answered
    page.fill("#search input[type=text]", "a")
    page.click("#search button[type=submit]")
    expect(page.locator("#hits")).to_have_attribute("aria-busy", "true")
    page.click("#search .cancel")
    expect(page.locator("#hits [role=alert]")).to_have_text("Cancelled.")
    expect(page.locator("#search .cancel")).to_be_hidden()
    page.click("#search button[type=submit]")
    page.keyboard.press("Escape")
    expect(page.locator("#hits [role=alert]")).to_have_text("Cancelled.")


def test_it_asks_for_a_key_and_says_where_there_is_no_index(browser: Browser, server: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(ANSWER_MS)
    page.goto(f"{server}/{STRICT}/")
    expect(page.locator("#start-error")).to_contain_text("wants an API key")
    page.fill("#key input", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#start-error")).to_have_text("The server does not know this API key.")
    page.fill("#key input", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#models")).to_contain_text("tiny")
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#search-hint")).to_contain_text("No index is served here")
    expect(page.locator("#search button[type=submit]")).to_be_disabled()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, server: str, image_file: Path, scheme: str
) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server)
    page.fill("#search input[type=text]", "a" * 200)
    page.click("#search button[type=submit]")
    expect(page.locator("#hits li")).to_have_count(len(CAPTIONS), timeout=ANSWER_MS)
    page.set_input_files("#caption input[type=file]", image_file)
    page.click("#caption button[type=submit]")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false", timeout=ANSWER_MS)
    assert page.evaluate(OVERFLOW) <= 0
    context.close()
