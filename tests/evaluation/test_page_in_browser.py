"""`report.html` in a real browser, from the disk: what moves, sorts and reads, on all sizes, without a request."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import CHROMIUM, DRIVER, Browser, browser
from pages import DOWN, NASTY, SLIGHTLY_DOWN, UP, encoded, page_of_two, viewed

from rewardsr.evaluation.page import Page, Picture, write_page

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "report.html", page_of_two())


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(window, page) -> Iterator[Browser]:
    """The page, freshly loaded; at the end nothing was complained about, and nothing was requested."""
    window.dark(False)
    window.open(page)
    yield window
    assert window.console() == []
    assert window.requests() == [page.as_uri()]
    assert window.js("return window.broken ?? null") is None, "a name was run as a script"


def until(what: Callable[[], Any], expected: Any) -> None:
    """Wait a little until something is as expected: pictures are decoded beside the script."""
    end = time.monotonic() + 10
    while what() != expected and time.monotonic() < end:
        time.sleep(0.05)
    assert what() == expected


def value(window: Browser) -> int:
    return int(window.js("return document.getElementById('handle').getAttribute('aria-valuenow')"))


def test_the_border_follows_mouse_finger_and_keys(shown) -> None:
    width = shown.js("return document.getElementById('stage').clientWidth")
    clip = "return getComputedStyle(document.getElementById('left-layer')).clipPath"
    assert value(shown) == 50 and "50%" in shown.js(clip)
    shown.drag("#handle", width // 4)
    assert 73 <= value(shown) <= 77 and "50%" not in shown.js(clip)
    shown.drag("#handle", -width // 2, touch=True)
    assert 22 <= value(shown) <= 28
    shown.js("document.getElementById('handle').focus()")
    shown.press("Home")
    assert value(shown) == 0
    shown.press("Right", "Right")
    assert value(shown) == 4
    shown.press("End", "Left")
    assert value(shown) == 98


def test_zoom_by_keys_wheel_and_buttons_and_pan(shown) -> None:
    transform = "return document.getElementById('right-image').style.transform"
    same = (
        "return ['left-image', 'canvas'].every((id) => document.getElementById(id).style.transform"
        " === document.getElementById('right-image').style.transform)"
    )
    shown.js("document.getElementById('stage').focus()")
    shown.press("+")
    assert "scale(1.5)" in shown.js(transform) and shown.js(same)
    shown.click("#in")
    assert "scale(2.25)" in shown.js(transform)
    shown.js("document.getElementById('stage').focus({preventScroll: true})")
    shown.wheel("#stage", -300)
    assert "scale(4.5)" in shown.js(transform)
    before, border = shown.js(transform), value(shown)
    shown.drag("#stage", 120, 40)  # its middle is the handle's: beside it
    shown.js("document.getElementById('stage').focus()")
    shown.press("Right")
    assert shown.js(transform) != before
    border = value(shown)
    shown.press("0")
    assert "scale(1)" in shown.js(transform) and value(shown) == border
    shown.click("#fit")
    assert shown.js("return document.getElementById('zoom').value") == "fit"


def test_two_fingers_zoom_and_leave_the_border(shown) -> None:
    width, before = shown.js("return document.getElementById('stage').clientWidth"), value(shown)
    shown.pinch("#stage", width // 8, width // 4)
    scale = "return Number(/scale\\(([\\d.]+)\\)/.exec(document.getElementById('right-image').style.transform)[1])"
    assert 1.8 < shown.js(scale) < 2.2 and value(shown) == before
    shown.pinch("#stage", width // 4, width // 8)
    assert shown.js(scale) < 1.2 and value(shown) == before


def test_the_wheel_scrolls_the_page_until_the_picture_has_the_focus(shown) -> None:
    shown.js("document.activeElement.blur(); document.getElementById('stage').scrollIntoView({behavior: 'instant'})")
    shown.wheel("#stage", 100)
    assert shown.js("return document.getElementById('zoom').value") == "fit"


def test_any_two_versions_of_any_image_can_be_compared(shown) -> None:
    corners = "return ['left-corner', 'right-corner'].map((id) => document.getElementById(id).textContent)"
    assert shown.js(corners) == ["base", "run"]
    choose = (
        "const select = document.getElementById(arguments[0]); select.value = arguments[1];"
        "select.dispatchEvent(new Event('change'))"
    )
    shown.js(choose, "left", "LQ")
    shown.js(choose, "right", "HQ")
    assert shown.js(corners) == ["LQ", "HQ"]
    shown.js("document.getElementById('stage').focus()")
    shown.press("s", "]")
    assert shown.js(corners) == ["HQ", "LQ"], "what was chosen stays, from image to image"
    assert shown.js("return document.getElementById('picture').value") == "b.png"
    shown.press("[", "[")
    assert shown.js("return document.getElementById('picture').value") == "c.png"
    assert shown.js("return document.getElementById('left-image').alt") == "c.png: HQ"


def test_without_a_base_two_different_versions_are_shown_first(window, tmp_path) -> None:
    labels = ("LQ", "strength=0", "strength=1", "HQ")
    picture = Picture("a.png", {label: encoded((90 + place, 90, 90)) for place, label in enumerate(labels)}, {})
    write_page(tmp_path / "page.html", Page("sweep", [], [], [picture]))
    window.open(tmp_path / "page.html")
    corners = "return ['left-corner', 'right-corner'].map((id) => document.getElementById(id).textContent)"
    assert window.js(corners) == ["strength=0", "strength=1"]
    assert window.console() == []


def test_the_difference_is_computed_and_amplified(shown) -> None:
    pixel = "return [...document.getElementById('canvas').getContext('2d').getImageData(arguments[0], 12, 1, 1).data]"
    assert not shown.js("return document.getElementById('difference-panel').checkVisibility()")
    shown.click("#difference")
    # base (100, 100, 100) against run (110, 104, 100), eight times; the left third is black in both.
    until(lambda: shown.js(pixel, 20), [80, 32, 0, 255])
    assert shown.js(pixel, 2) == [0, 0, 0, 255]
    said = shown.js("return document.getElementById('difference-text').textContent")
    assert "largest 10 of 255" in said and "mean 3.11" in said, said
    shown.js("const gain = document.getElementById('gain'); gain.value = 4; gain.dispatchEvent(new Event('input'))")
    assert shown.js(pixel, 20) == [160, 64, 0, 255]
    shown.click("#difference")
    assert not shown.js("return document.getElementById('difference-panel').checkVisibility()")


def test_a_fall_within_its_margin_reads_as_one_that_does_not_count(window, tmp_path) -> None:
    page = Page("", [], [viewed(margins={"psnr": 0.1, "ssim": 0.1}, psnr=SLIGHTLY_DOWN, ssim=DOWN, detail=UP)])
    window.open(write_page(tmp_path / "report.html", page), 360, 740)
    row = "const row = document.querySelectorAll('.verdict tbody tr')[arguments[0]];"
    small, fallen = (window.js(f"{row} return row.innerText", place) for place in (0, 1))
    assert "▽ −0.0050" in small and "within its margin of 0.1" in small
    assert "▼ −0.1500" in fallen and "beyond its margin of 0.1" in fallen
    quiet, *colours = (
        window.js(f"{row} return getComputedStyle(row.querySelector('{part}')).color", place)
        for part, place in ((".quiet", 0), (".gain", 0), (".gain", 1))
    )
    assert colours[0] == quiet != colours[1], "only a fall that counts is red"
    card = window.js("return document.querySelector('.card').innerText")
    assert "Down within the margin, which does not count: psnr −0.0050 [−0.0075, −0.0025] (margin 0.1)." in card
    assert "Mixed: up detail; down ssim" in card
    assert window.js("return document.documentElement.scrollWidth") <= 360
    assert window.console() == []


ROWS = "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[0].textContent)"
SORT = "return [...document.querySelectorAll('#table thead th')].map((head) => head.getAttribute('aria-sort'))"


def test_the_table_sorts_by_click_and_keys_and_jumps_to_the_picture(shown) -> None:
    assert shown.js(ROWS) == ["b.png", "c.png", NASTY], "what gained least comes first"
    assert shown.js(SORT) == ["none", "ascending", "none"]
    shown.click("#table thead th:nth-child(2) button")
    assert shown.js(ROWS) == [NASTY, "c.png", "b.png"] and shown.js(SORT)[1] == "descending"
    shown.js("document.querySelector('#table thead button').focus()")
    shown.press("Enter")
    assert shown.js(ROWS) == [NASTY, "b.png", "c.png"] and shown.js(SORT) == ["ascending", "none", "none"]
    shown.press("Enter")
    assert shown.js(ROWS) == ["c.png", "b.png", NASTY], "the heading keeps the focus"
    shown.js("document.querySelector('#table tbody .link').focus()")
    shown.press("Enter")
    assert shown.js("return document.getElementById('picture').value") == "c.png"
    assert shown.js("return document.activeElement.id") == "stage"
    cell = "return document.querySelector('#table tbody tr td').textContent"
    assert shown.js(cell) == "+0.15"
    shown.js("const q = document.getElementById('quantity'); q.value = 'base'; q.dispatchEvent(new Event('change'))")
    assert shown.js(cell) == "0.52"


def test_curves_are_read_by_mouse_and_keys_and_runs_are_switched_off(shown) -> None:
    reading = "return document.querySelector('.reading').textContent"
    drawn = "return document.querySelector('.chart svg').querySelectorAll('.curve').length"
    assert shown.js("return document.querySelector('.chart h4').textContent") == "psnr (validation)"
    assert shown.js(drawn) == 2
    assert shown.js("return document.querySelector('.chart svg').querySelectorAll('.band').length") == 2
    shown.js("document.querySelector('.chart svg').focus()")
    shown.press("Home")
    assert shown.js(reading) == "run, step 20: 0.6 [0.55, 0.65] · control, step 20: 0.5 [0.45, 0.55]"
    shown.press("Right")
    assert "step 40" in shown.js(reading)
    shown.js(
        "const box = document.querySelector('.chart svg'); const at = box.getBoundingClientRect();"
        "box.dispatchEvent(new PointerEvent('pointermove', {clientX: at.left + at.width * 0.2, clientY: at.top + 40}))"
    )
    assert "step 20" in shown.js(reading)
    shown.click("#legend button:nth-child(2)")
    assert shown.js(drawn) == 1 and "control" not in shown.js(reading)
    assert (
        shown.js("return document.querySelector('#legend button:nth-child(2)').getAttribute('aria-pressed')") == "false"
    )


def test_light_and_dark_by_the_system_and_by_the_switch(shown) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 22, 26)"
    assert shown.js(ground) == light
    shown.dark(True)
    assert shown.js(ground) == dark
    shown.click("#theme")
    assert (
        shown.js(ground) == light and shown.js("return document.getElementById('theme').textContent") == "Theme: light"
    )
    shown.click("#theme")
    shown.dark(False)
    assert shown.js(ground) == dark
    shown.click("#theme")
    assert shown.js(ground) == light


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1920])
def test_no_width_scrolls_sideways(shown, page, width) -> None:
    shown.open(page, width, 740)
    assert shown.js("return document.documentElement.scrollWidth") <= width
    shown.click("#difference")
    shown.js("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    assert shown.js("return document.documentElement.scrollWidth") <= width
    stage = shown.js("return document.getElementById('stage').getBoundingClientRect().toJSON()")
    assert stage["left"] >= 0 and stage["right"] <= width and stage["width"] > 200


def test_everything_that_acts_has_a_name(shown) -> None:
    nameless = """
        return [...document.querySelectorAll('button, select, input, a, [role=slider], [role=img], [role=region]')]
            .filter((one) => one.checkVisibility())
            .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim() || one.closest('label')))
            .map((one) => one.outerHTML.slice(0, 80))
    """
    assert shown.js(nameless) == []
    assert shown.js("return document.querySelectorAll('h1').length") == 1
    assert shown.js("return document.documentElement.lang") == "en"
    hidden = shown.js(
        "return [...document.querySelectorAll('nav a')].filter((one) => one.hidden).map((one) => one.hash)"
    )
    assert hidden == ["#cast"], "what is not there has no link"
