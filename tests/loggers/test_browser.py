"""The report as people see it: in a real browser, wide, narrow, dark and on paper.

Where no Chromium is installed these tests are skipped and say so; VQF_BROWSER=chromium makes that an error. The
screenshots stay in pytest's temporary folder; `--basetemp=FOLDER` puts them where you like.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.loggers.made_up import make_run
from tests.support.browser import WANTED, Browser, find_browser, open_browser
from vqf.loggers.report.page import write_report

pytestmark = pytest.mark.slow

# What sticks out of the page, and by what; nothing may, or a phone would have to be pushed from side to side.
TOO_WIDE = """width =>
[...document.querySelectorAll('body *')]
  .filter(each => each.getBoundingClientRect().right > width + 1)
  .map(each => each.tagName + ' ' + each.className + ' ' + each.textContent.slice(0, 40))
"""
IMAGES = """
[...document.images].map(each => ({
  there: each.complete && each.naturalWidth > 0, width: each.getBoundingClientRect().width, words: each.alt,
}))
"""
# The contrast of every text with what is behind it, as the guidelines for accessible pages define it (WCAG 2.2, 1.4.3).
CONTRASTS = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const read = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = color => {
    const linear = each => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4;
    const [r, g, b] = color.map(each => linear(each / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = read(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  return [...document.querySelectorAll('h1, h2, h3, p, th, td, dt, dd, figcaption, pre, summary, caption')]
    .filter(each => each.innerText.trim() && each.checkVisibility())
    .map(each => {
      const [a, b] = [light(read(getComputedStyle(each).color)), light(behind(each))].sort((a, b) => b - a);
      return [(a + .05) / (b + .05), each.tagName + ' ' + each.innerText.slice(0, 30)];
    });
})()
"""
SIZES = """
[...document.querySelectorAll('body *')].filter(each => !each.children.length && each.innerText?.trim())
  .map(each => parseFloat(getComputedStyle(each).fontSize))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip(f"no Chromium is installed, nobody looks at the page; {WANTED}=chromium demands one")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def too_wide(browser: Browser, width: int) -> list[str]:
    """Return what does not fit a window of a width."""
    return browser.run(f"({TOO_WIDE.strip()})({width})")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize(("width", "mobile"), [(1100, False), (390, True), (320, True)])
def test_the_page_is_whole_at_any_width(browser: Browser, page: Path, tmp_path: Path, width: int, mobile: bool) -> None:
    browser.open(page, width, mobile=mobile)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.absolute().as_uri()]
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth") == width
    assert too_wide(browser, width) == []
    shown = browser.run(IMAGES)
    assert len(shown) == 47
    assert all(each["there"] and each["words"] for each in shown)
    assert min(each["width"] for each in shown) >= 64  # as many pixels as an emoji has, even beside two others
    assert min(browser.run(SIZES)) >= 12
    browser.screenshot(tmp_path / f"report-{width}.png")
    image = Image.open(tmp_path / f"report-{width}.png").convert("RGB")
    assert image.width == width * (2 if mobile else 1)
    assert image.height > image.width
    assert len(image.getcolors(image.width * image.height)) > 1000  # images, not a blank page


@pytest.mark.parametrize(("dark", "width"), [(False, 1100), (True, 1100), (True, 390)])
def test_everything_can_be_read(browser: Browser, page: Path, tmp_path: Path, dark: bool, width: int) -> None:
    browser.open(page, width, dark=dark)
    found = browser.run(CONTRASTS)
    assert len(found) > 50
    assert [each for each in found if each[0] < 4.5] == []
    browser.screenshot(tmp_path / f"report-{width}-{'dark' if dark else 'light'}.png")
    corner = Image.open(tmp_path / f"report-{width}-{'dark' if dark else 'light'}.png").convert("L").getpixel((2, 2))
    assert isinstance(corner, int) and (corner < 64) == dark


def test_the_page_prints(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, 700, paper=True)  # pixels of A4 between margins
    assert too_wide(browser, 700) == []
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("[...document.querySelectorAll('details')].some(each => each.checkVisibility())") is False
    browser.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", content)) <= 8
    assert len(re.findall(rb"/Subtype\s*/Image\b", content)) >= 30


def test_what_unfolds_fits_a_phone_too(browser: Browser, page: Path) -> None:
    browser.open(page, 390, mobile=True)
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.run("document.querySelectorAll('details[open]').length") >= 1
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert too_wide(browser, 390) == []


def test_a_page_that_breaks_these_rules_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """What the tests above rest on can see what they look for."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width"><body style="background: #fff">'
        '<p style="color: #999; font-size: 8px">pale</p><div style="width: 900px">wide</div>'
        '<img src="missing.png" alt="gone"><script>throw new Error("no")</script></body>'
    )
    browser.open(bad, 390, mobile=True)
    assert any(url.endswith("missing.png") for url in browser.requests)
    assert len(browser.complaints) >= 2
    assert browser.run("document.documentElement.scrollWidth") > 390
    assert [each.split()[0] for each in too_wide(browser, 390)] == ["DIV"]
    assert browser.run(IMAGES)[0]["there"] is False
    assert browser.run(CONTRASTS)[0][0] < 4.5
    assert min(browser.run(SIZES)) == 8


def test_a_browser_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WANTED, "no-such-browser")
    with pytest.raises(FileNotFoundError, match="VQF_BROWSER=no-such-browser: no such program"):
        find_browser()
