"""Drawing motion on the page, in a real Chromium: arrows, pins, the brush, by mouse, finger and keyboard."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving.test_page import DESKTOP, PHONE, Server, Tab, until
from tiny import tiny_longer_bundle

from cinemo.bundle import ModelBundle, load_bundle, read_card
from cinemo.media.arrows import dense_field
from cinemo.serving.store.media import input_name

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_longer_bundle(tmp_path_factory.mktemp("longer"))


@pytest.fixture(scope="module")
def bundle(location: Path) -> ModelBundle:
    return load_bundle(location, "cpu")


@pytest.fixture
def server(location: Path, bundle: ModelBundle, tmp_path: Path) -> Iterator[Server]:
    made = Server(read_card(location), bundle, tmp_path)
    made.start()
    yield made
    made.close()


@pytest.fixture
def open_tab(chromium: Any, server: Server, picture: Path) -> Iterator[Callable[..., Tab]]:
    contexts = []

    def opened(**options: Any) -> Tab:
        context = chromium.new_context(**{"viewport": DESKTOP} | options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        tab = Tab(context, server.url).ready()
        tab.page.set_input_files("#input_reference", picture)
        tab.page.wait_for_selector("#drop.filled")
        tab.see(f"{BOARD}.clientHeight > 0 && {BOARD}.width > 300")
        return tab

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the model: its sides are cut off."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((900, 400)).save(path)
    return path


BOARD = "document.getElementById('arrows')"


def drag(tab: Tab, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place of the board to another, in shares of it."""
    tab.page.locator("#arrows").scroll_into_view_if_needed()
    box = tab.page.locator("#arrows").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    tab.page.mouse.move(*places[0])
    tab.page.mouse.down()
    tab.page.mouse.move(*places[1], steps=4)
    tab.page.mouse.up()


def said(tab: Tab) -> str:
    return str(tab.page.text_content(".drawing .tools .note"))


def test_what_is_drawn_is_what_the_server_is_asked_for(open_tab: Callable[..., Tab], server: Server) -> None:
    tab = open_tab()
    drag(tab, (0.25, 0.5), (0.5, 0.5))
    drag(tab, (0.75, 0.75), (0.75, 0.75))
    assert said(tab) == "1 arrow, 1 pin"
    drag(tab, (0.1, 0.1), (0.9, 0.9))
    tab.page.get_by_role("button", name="Undo").click()
    assert said(tab) == "1 arrow, 1 pin"
    tab.page.get_by_role("button", name="Brush").click()
    drag(tab, (0.1, 0.5), (0.4, 0.5))
    assert said(tab) == "1 arrow, 1 pin, brush"
    tab.page.fill("#prompt", "waves")
    tab.page.click("#animate")
    tab.page.wait_for_selector(".pane[data-status=queued]")
    job = next(iter(server.store.page()))
    # 900 x 400 for a model of 32 x 48: 600 of its pixels in width are seen, from 150 on.
    arrow, pin = job.request["arrows"]
    assert arrow == pytest.approx([300, 200, 450, 200], abs=4)
    assert pin == pytest.approx([600, 300, 600, 300], abs=4)
    mask = np.asarray(Image.open(io.BytesIO(server.store.media.read(input_name(job.id, "mask")))))
    assert mask.shape[:2] == (400, 900)
    assert mask[200, 220:380].min() == 255
    assert mask[60].max() == mask[200, 600:].max() == 0
    server.work()
    tab.done()
    assert tab.complaints == []
    # An earlier video gives its arrows back.
    tab.page.get_by_role("button", name="Clear").click()
    assert said(tab) == "0 arrows"
    tab.page.get_by_role("button", name="Use settings").click()
    tab.see("document.querySelector('.drawing .tools .note').textContent", "1 arrow, 1 pin, brush")
    tab.page.reload()
    tab.ready().done()
    tab.page.get_by_role("button", name="Use settings").click()
    tab.see("document.querySelector('.drawing .tools .note').textContent", "1 arrow, 1 pin, brush")
    tab.page.click("#animate")
    until(lambda: len(server.store.page()) == 2)
    again = np.asarray(Image.open(io.BytesIO(server.store.media.read(input_name(server.store.page()[0].id, "mask")))))
    assert np.mean((again > 127) != (mask > 127)) < 0.01, "painted as before"


def test_the_field_that_is_shown_is_the_servers(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    arrows = [[0.2, 0.3, 0.6, 0.4], [0.7, 0.8, 0.7, 0.8]]
    places = [(10, 10), (60, 40), (90, 70), (140, 95)]
    script = f"""import('/page/drawing.js').then(({{ fieldAt }}) =>
        {[list(place) for place in places]}.map(([x, y]) => fieldAt({arrows}, x, y, 144, 96)))"""
    shown = tab.page.evaluate(script)
    # Pixels begin at their corners there, and here have their centres at whole numbers: starts are whole ones.
    wide = np.array(arrows) * [144, 96, 144, 96]
    starts = wide[:, :2].round()
    field = dense_field(np.concatenate([starts, starts + wide[:, 2:] - wide[:, :2]], 1), 1.0, (96, 144))
    for (x, y), got in zip(places, shown, strict=True):
        np.testing.assert_allclose(got, field[:, y, x], atol=0.6)
    assert tab.complaints == []


def test_without_a_mouse(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.page.focus("#arrows")
    for key in ["Enter", *["ArrowRight"] * 5, "Enter"]:
        tab.page.keyboard.press(key)
    assert said(tab) == "1 arrow"
    for key in ["Enter", "ArrowLeft", "Escape", "Enter", "Enter"]:
        tab.page.keyboard.press(key)
    assert said(tab) == "1 arrow, 1 pin"
    tab.page.keyboard.press("Backspace")
    assert said(tab) == "1 arrow"


def test_with_a_finger_on_a_phone(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(viewport=PHONE, has_touch=True, is_mobile=True)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    box = tab.page.locator("#arrows").bounding_box()
    tab.page.locator("#arrows").scroll_into_view_if_needed()
    box = tab.page.locator("#arrows").bounding_box()
    touch = tab.page.context.new_cdp_session(tab.page)
    for kind, x in (("touchStart", 0.3), ("touchMove", 0.5), ("touchMove", 0.6)):
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + 0.5 * box["height"]}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    tab.see("document.querySelector('.drawing .tools .note').textContent", "1 arrow")
