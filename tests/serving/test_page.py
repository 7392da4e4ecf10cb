"""The page for people: its files as they are served, and the page in a real Chromium with a real runner behind it."""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from ports import free_port
from tiny import FRAMES, SIZE, tiny_bundle, tiny_longer_bundle

from cinemo.animate import load_image
from cinemo.bundle import BundleCard, ModelBundle, load_bundle, read_card
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe
from cinemo.methods.cinemo import CinemoControls
from cinemo.methods.quality import QualityTable, Sampled
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.http.api import ApiSettings, build_api
from cinemo.serving.http.form import VideoForm, VideoRequest
from cinemo.serving.http.refusals import refusal
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import JobStore, QueueLimits
from cinemo.serving.store.keys import KeyStore
from cinemo.serving.store.media import MediaStore, image_name

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MAX_QUEUED = 16
LONG = 120  # sampling steps of a job that is caught while it runs


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bundle(location: Path) -> ModelBundle:
    return load_bundle(location, "cpu")


@pytest.fixture(scope="module")
def card(location: Path) -> BundleCard:
    """Calibrated at three buckets."""
    card = read_card(location)
    measured = {
        "values": [0, 10, 19],
        "mean_motion": [0.02, 0.12, 0.31],
        "curve": [0.02, 0.12, 0.31],
        "interval": [[0.01, 0.08, 0.2], [0.03, 0.16, 0.42]],
    }
    return replace(card, motion=replace(card.motion, calibration=measured))


def open_store(directory: Path) -> JobStore:
    database = Database(f"sqlite:///{directory}/state.sqlite")
    return JobStore(database, MediaStore(str(directory / "media")), QueueLimits(max_queued=MAX_QUEUED))


async def always() -> bool:
    return True


class Server:
    """The real interface under uvicorn on a port of its own, with a store and a runner; may go away and come back."""

    def __init__(self, card: BundleCard, bundle: ModelBundle, directory: Path) -> None:
        self.card, self.bundle = card, bundle
        self.store = open_store(directory)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.runner: JobRunner | None = None

    def start(self, around: Callable[[Any], Any] = lambda app: app, **parts: Any) -> None:
        app = build_api(self.store, lambda: self.card, always, **parts)
        config = uvicorn.Config(around(app), port=self.port, log_level="warning", timeout_graceful_shutdown=1)
        self.http = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.http.run, daemon=True)
        self.thread.start()
        until(lambda: self.http.started)

    def work(self) -> None:
        self.runner = JobRunner(self.store, self.bundle)
        self.runner.start()

    def rest(self) -> None:
        if self.runner:
            self.runner.close()
        self.runner = None

    def submit(self, prompt: str) -> None:
        """A job that somebody else asked for."""
        controls = CinemoControls(seed=1, steps=1)
        asked = VideoRequest(VideoForm.model_construct(prompt=prompt), controls, {}, frozenset(), seed_drawn=False)
        self.store.submit(asked.asked(self.card), png())

    def stop(self) -> None:
        self.http.should_exit = True
        self.thread.join(timeout=20)

    def close(self) -> None:
        self.rest()
        self.stop()


@pytest.fixture
def server(card: BundleCard, bundle: ModelBundle, tmp_path: Path) -> Iterator[Server]:
    made = Server(card, bundle, tmp_path)
    made.start()
    yield made
    made.close()


class Tab:
    """A tab with the page in it, and everything that it asked for and complained about."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.url, self.requests, self.complaints = url, list[str](), list[str]()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def ready(self) -> Tab:
        self.page.wait_for_selector("#animate:enabled")
        return self

    def ask(self, prompt: str = "waves", picture: Path | None = None, **fields: Any) -> None:
        """Fill the form and send it."""
        if picture:
            self.page.set_input_files("#input_reference", picture)
            self.page.wait_for_selector("#drop.filled")
        self.page.fill("#prompt", prompt)
        if fields:
            self.page.locator(".fold").evaluate("fold => fold.open = true")
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        self.page.click("#animate")

    def see(self, script: str, *wanted: Any, seconds: float = 60) -> Any:
        """What an expression gives, as soon as that is true (or one of ``wanted``).

        The page's policy forbids the eval that Playwright's own waiting needs.
        """
        return until(lambda: self.page.evaluate(script), *wanted, seconds=seconds)

    def done(self, videos: int = 1) -> None:
        self.see("document.querySelectorAll('.pane .screen video').length", videos)

    def error(self, field: str) -> str:
        self.page.wait_for_selector(f"#{field}-error:not([hidden])")
        return str(self.page.text_content(f"#{field}-error"))


@pytest.fixture
def open_tab(chromium: Any, server: Server) -> Iterator[Callable[..., Tab]]:
    contexts = []

    def opened(beside: Tab | None = None, **options: Any) -> Tab:
        context = beside.page.context if beside else chromium.new_context(**{"viewport": DESKTOP} | options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        return Tab(context, server.url)

    yield opened
    for context in contexts:
        context.close()


def until(look: Callable[[], Any], *wanted: Any, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found in wanted if wanted else found:
            return found
        assert time.monotonic() < deadline, f"still {found!r}, expected {wanted or 'something'}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upright photograph of a phone: stored lying, with EXIF orientation 6."""
    path = tmp_path_factory.mktemp("pictures") / "phone.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).resize((900, 600)).save(path, exif=exif)
    return path


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(card: BundleCard, tmp_path: Path) -> TestClient:
    return TestClient(build_api(open_store(tmp_path), lambda: card, always))


def test_the_files_name_no_other_origin_and_are_kept_by_their_tag(client: TestClient) -> None:
    front = client.get("/")
    assert front.headers["content-type"].startswith("text/html")
    names = ["page/page.css", "page/page.js", "page/icon.svg"]
    assert all(name in front.text for name in names)
    for path in ["", *names, "page/api.js", "page/stage.js"]:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        outside = answer.text.replace("http://www.w3.org/2000/svg", "").replace("https://html.spec.whatwg.org", "")
        assert "http://" not in outside, path
        assert "https://" not in outside, path
        tag = answer.headers["etag"]
        again = client.get(f"/{path}", headers={"If-None-Match": f'"other", W/{tag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get(f"/{path}", headers={"If-None-Match": '"other"'}).status_code == 200
        assert client.head(f"/{path}").content == b""


def test_nothing_else_is_served_and_nothing_is_written_into_the_api_document(client: TestClient) -> None:
    for path in ("/page/", "/page/..%2fapi.py", "/page/../api.py", "/page/index.html", "/page/page.py"):
        assert client.get(path).status_code == 404, path
    assert client.post("/").status_code == 405
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or "page" in path]


def test_a_model_says_what_its_motion_buckets_mean(client: TestClient, card: BundleCard) -> None:
    motion = client.get("/v1/models").json()["data"][0]["motion"]
    assert [each["bucket"] for each in motion] == list(range(20))
    assert [each["bucket"] for each in motion if each["measured"] is not None] == [0, 10, 19]
    assert (motion[10]["measured"], motion[10]["interval"]) == (0.12, [0.08, 0.16])
    # The stillest bucket has the most alike frames; together they cover 0..1 without a gap.
    assert (motion[0]["ssim"][1], motion[19]["ssim"][0]) == (1.0, 0.0)
    assert all(left["ssim"][0] == right["ssim"][1] for left, right in itertools.pairwise(motion))
    assert motion[3]["ssim"] == [card.motion.edges[15], card.motion.edges[16]]


# --- the page in a browser -------------------------------------------------------------------------------------------

browser = pytest.mark.browser


@browser
@pytest.mark.slow
def test_a_video_from_picture_to_file(
    open_tab: Callable[..., Tab], server: Server, picture: Path, tmp_path: Path
) -> None:
    tab = open_tab().ready()
    page = tab.page
    # The preview is what the model will see: upright, in the model's shape.
    assert page.is_hidden("#motion-note")
    page.get_by_role("button", name="What is this: How much it moves").click()
    assert "measured" in page.text_content("#motion-note")
    page.set_input_files("#input_reference", picture)
    page.wait_for_selector("#drop.filled")
    assert page.text_content("#picture-size") == "600 × 900"
    shape = page.locator("#drop").bounding_box()
    assert shape["width"] / shape["height"] == pytest.approx(SIZE[1] / SIZE[0], rel=0.02)
    page.focus("#motion_bucket")
    page.keyboard.press("Home")
    assert "differ by 2 %" in page.text_content("#motion-note").replace("\u00a0", " ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tab.ask("a boat, café 🚤", num_inference_steps=LONG, seed=4711, guidance_scale=1.5, negative_prompt="rain")
    page.wait_for_selector(".pane[data-status=queued]")
    assert page.text_content(".status") == "Waiting in the queue"
    server.work()
    seen, glimpses = set(), set()
    while not page.query_selector(".pane[data-status=completed]"):
        seen.add(page.evaluate("document.querySelector('.pane progress')?.value ?? 0"))
        glimpses.add(page.evaluate("document.querySelector('.glimpse:not([hidden])')?.src ?? ''"))
        time.sleep(0.02)
    assert any(each.startswith("data:image/webp") for each in glimpses), "it is seen while it is made"
    assert len(seen) >= 5, f"progress was seen to move through {sorted(seen)}"
    assert any(url.endswith("/events") for url in tab.requests)
    tab.done()
    assert page.is_hidden(".glimpse")
    # It plays by itself, in a loop, and is scrubbed frame by frame.
    video = "document.querySelector('.pane .screen video')"
    assert tab.page.evaluate(f"[{video}.videoWidth, {video}.videoHeight]") == [SIZE[1], SIZE[0]]
    before = page.evaluate(f"{video}.currentTime")
    tab.see(f"{video}.currentTime !== {before} && !{video}.paused")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("slider", name="Frame").focus()
    page.keyboard.press("End")
    assert page.text_content(".counter") == f"{FRAMES} / {FRAMES}"
    assert page.evaluate(f"{video}.currentTime") == pytest.approx((FRAMES - 0.5) / 8, abs=0.01)
    # What is downloaded holds the settings, and the page says so.
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-boat-café-seed4711.mp4"
    download.value.save_as(tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width) == (FRAMES, *SIZE)
    metadata = read_metadata(tmp_path / "a.mp4")
    settings = json.loads(metadata["comment"])
    asked = {
        "prompt": "a boat, café 🚤", "negative_prompt": "rain", "seed": 4711, "steps": LONG, "guidance_scale": 1.5,
        "motion_bucket": 2, "dct_init": True,
    }  # fmt: skip
    assert {name: settings[name] for name in asked} == asked
    page.click("text=Settings inside the file")
    assert metadata["bundle"] in page.text_content(".inside")
    # Dropped on the page, the file gives its settings back.
    page.fill("#prompt", "")
    page.fill("#seed", "1")
    page.set_input_files("#input_reference", tmp_path / "a.mp4")
    tab.see("document.getElementById('prompt').value", "a boat, café 🚤")
    filled = {name: page.input_value(f"#{name}") for name in ("seed", "motion_bucket", "num_inference_steps")}
    assert filled == {"seed": "4711", "motion_bucket": "2", "num_inference_steps": str(LONG)}
    assert all(url.startswith((server.url, "blob:", "data:")) for url in tab.requests), tab.requests
    assert tab.complaints == []


@browser
def test_cancel(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    server.work()
    tab = open_tab().ready()
    tab.ask(picture=picture, num_inference_steps=999)
    tab.see("document.querySelector('.pane progress')?.value > 0")
    tab.page.get_by_role("button", name="Cancel").click()
    tab.page.wait_for_selector(".pane[data-status=cancelled]")
    assert tab.page.text_content(".status") == "Cancelled"
    assert [job.status for job in server.store.page()] == ["cancelled"]
    tab.see("document.querySelector('.card .badge')?.textContent", "cancelled")
    tab.ask("again", num_inference_steps=2)
    tab.done()
    assert tab.complaints == []


@browser
def test_errors_are_told_where_they_belong(open_tab: Callable[..., Tab], picture: Path, tmp_path: Path) -> None:
    tab = open_tab().ready()
    tab.page.click("#animate")
    assert tab.error("input_reference") == "Choose a picture first."
    # What only the server knows: its own words, beside the field, which is unfolded and has the focus.
    tab.ask("x" * 4001, picture)
    assert "at most 4000 characters" in tab.error("prompt")
    assert tab.page.evaluate("document.activeElement.id") == "prompt"
    tab.page.fill("#prompt", "waves")
    assert tab.page.is_hidden("#prompt-error"), "it goes away with the next key"
    tab.page.locator(".fold").evaluate("fold => fold.open = true")
    tab.page.fill("#guidance_scale", "1000")
    tab.page.locator(".fold").evaluate("fold => fold.open = false")
    tab.page.click("#animate")
    assert "50" in tab.error("guidance_scale")
    assert tab.page.is_visible("#guidance_scale")
    assert tab.page.get_attribute("#guidance_scale", "aria-invalid") == "true"
    tab.page.fill("#guidance_scale", "")
    tab.page.fill("#seed", "seven")
    tab.page.click("#animate")
    assert "whole number" in tab.error("seed")
    small = tmp_path / "small.png"
    Image.new("RGB", (100, 4)).save(small)
    tab.page.fill("#seed", "")
    tab.ask(picture=small)
    assert "100x4" in tab.error("input_reference")


@browser
def test_a_picture_that_cannot_be_used_stops_the_button_before_anything_is_sent(
    open_tab: Callable[..., Tab], server: Server, picture: Path, tmp_path: Path
) -> None:
    server.stop()
    server.start(settings=ApiSettings(body_bytes=300_000, pixels=700_000))
    tab = open_tab().ready()
    whole, half = picture.read_bytes(), len(picture.read_bytes()) // 2
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    Image.new("RGB", (1000, 701)).save(tmp_path / "large.webp")
    Image.new("RGB", (60, 40)).save(
        tmp_path / "moving.png", save_all=True, append_images=[Image.new("RGB", (60, 40), 9)]
    )
    contents = {
        "notes.txt": (b"no picture", "not a picture"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + b"\0" * 50, "HEIC"),
        "broken.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "damaged"),
        "half.jpg": (whole[:half], "damaged"),
        "nearly.jpg": (whole[:-200], "damaged"),
        "half.png": (png()[:3000], "damaged"),
        "heavy.png": ((tmp_path / "heavy.png").read_bytes(), "too large"),
        "large.webp": ((tmp_path / "large.webp").read_bytes(), "0.7 megapixels"),
        "moving.png": ((tmp_path / "moving.png").read_bytes(), "animated"),
        "empty.png": (b"", "empty"),
    }
    tab.page.fill("#prompt", "waves")
    for name, (content, why) in contents.items():
        tab.page.set_input_files("#input_reference", picture)
        tab.page.wait_for_selector("#animate:enabled")
        (tmp_path / name).write_bytes(content)
        tab.page.set_input_files("#input_reference", tmp_path / name)
        assert name in tab.error("input_reference")
        assert why in tab.error("input_reference")
        assert tab.page.is_disabled("#animate"), name
        assert not tab.page.query_selector("#drop.filled"), f"{name}: the one before is not what was meant"
    tab.page.press("#prompt", "Control+Enter")
    # Names and types are often wrong: what it is, is what counts.
    (tmp_path / "photo.txt").write_bytes(whole)
    tab.page.set_input_files("#input_reference", tmp_path / "photo.txt")
    tab.page.wait_for_selector("#animate:enabled")
    assert tab.page.is_hidden("#input_reference-error")
    assert server.store.page() == []
    assert not [url for url in tab.requests if url.endswith("/v1/videos")]
    assert tab.complaints == []


@browser
@pytest.mark.slow
def test_several_seeds_side_by_side(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    server.work()
    tab = open_tab().ready()
    page = tab.page
    page.select_option("#count", "3")
    tab.ask("a boat", picture, seed=7, num_inference_steps=2)
    tab.done(3)
    jobs = server.store.page()[::-1]
    assert [job.request["seed"] for job in jobs] == [7, 8, 9]
    assert {job.request["prompt"] for job in jobs} == {"a boat"}
    assert [row.text_content() for row in page.query_selector_all(".differences .differs")] == ["Seed (differs)789"]
    assert page.url.endswith("#" + "+".join(job.id for job in jobs))
    times = "[...document.querySelectorAll('.screen video')].map(video => video.currentTime)"
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("slider", name="Frame").focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert page.evaluate(times) == [0.0625] * 3
    page.get_by_role("button", name="Close B").click()
    tab.see("document.querySelectorAll('.pane').length", 2)
    # Without a seed the first is drawn here, and a queue that is full takes what it can.
    server.rest()
    for _ in range(MAX_QUEUED - 2):
        server.submit("in the way")
    page.select_option("#count", "4")
    page.fill("#seed", "")
    page.click("#animate")
    tab.see("document.querySelectorAll('.pane[data-status=queued]').length", 2)
    assert page.is_visible("text=Try again")
    first, second = (job.request["seed"] for job in server.store.page(2)[::-1])
    assert second == first + 1
    server.work()
    until(lambda: server.store.waiting() < 8)
    tab.see("document.querySelector('#form-note button').textContent", "Try again")
    page.get_by_role("button", name="Try again").click()
    tab.see("document.querySelectorAll('.pane').length", 4)
    assert sorted(job.request["seed"] for job in server.store.page(4)) == [first + k for k in range(4)]


@browser
def test_words_that_a_person_knows_and_what_the_model_is(
    open_tab: Callable[..., Tab], server: Server, picture: Path
) -> None:
    tab = open_tab().ready()
    said = tab.page.text_content("main").lower()
    assert [word for word in ("ssim", "dct", "latent", "bucket", "denois", "guidance") if word in said] == []
    assert "48 × 32 pixels" in tab.page.text_content("#toy")
    assert tab.page.is_visible("#toy")
    recipe = server.card.recipe
    wide = recipe.model_copy(update={"data": recipe.data.model_copy(update={"size": (320, 512)})})
    server.stop()
    server.card = replace(server.card, recipe=wide)
    server.start(tokens=lambda prompt: (len(prompt.split()), 5))
    tab.page.reload()
    tab.ready()
    assert tab.page.is_hidden("#toy")
    tab.ask("one two three four five six seven eight nine ten", picture)
    assert "about the first 50\u00a0%" in tab.page.wait_for_selector(".facts .notice").text_content()


@browser
@pytest.mark.slow
def test_a_full_queue_counts_down_and_tries_again(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    server.work()
    tab = open_tab().ready()
    tab.ask("the first", picture)  # says how long a job takes, and so how long to wait
    tab.done()
    server.rest()
    for _ in range(MAX_QUEUED):
        server.submit("in the way")
    tab.ask("one too many")
    again = tab.page.get_by_role("button", name="Try again")
    again.wait_for()
    assert again.is_disabled()
    assert f"{MAX_QUEUED} jobs are waiting" in tab.page.text_content("#form-note")
    server.work()
    tab.see("document.querySelector('#form-note button').textContent", "Try again")
    until(lambda: server.store.waiting() < MAX_QUEUED)
    again.click()
    tab.see("document.querySelector('.facts .prompt')?.textContent", "one too many")
    tab.done()
    assert tab.page.text_content("#form-note") == ""


@pytest.mark.slow
@browser
def test_a_server_that_goes_away_and_comes_back(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    tab = open_tab().ready()
    tab.ask("patience", picture, num_inference_steps=8)
    tab.page.wait_for_selector(".pane[data-status=queued]")
    server.stop()
    tab.see("document.querySelector('.status').textContent.includes('cannot be reached')")
    tab.page.fill("#prompt", "nobody hears this")
    tab.page.click("#animate")
    tab.see("document.getElementById('form-note').textContent.includes('cannot be reached')")
    server.start()
    server.work()
    tab.done()


@pytest.mark.slow
@browser
def test_two_tabs_side_by_side(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    server.work()
    left = open_tab().ready()
    right = open_tab(beside=left).ready()
    left.ask("left", picture, num_inference_steps=60)
    right.ask("right", picture, num_inference_steps=6)
    for tab in (left, right):
        tab.done()
        tab.see("document.querySelectorAll('.card[data-status=completed]').length", 2)
    assert [tab.page.text_content(".facts .prompt") for tab in (left, right)] == ["left", "right"]
    right.page.get_by_role("button", name="Delete").click()
    assert len(server.store.page()) == 2, "it asks once more"
    right.page.get_by_role("button", name="Delete for good").click()
    left.see("document.querySelectorAll('.card').length", 1)
    assert left.page.is_visible(".pane .screen video")
    assert left.complaints + right.complaints == []


@browser
def test_history_in_pages_with_thumbnails(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    for number in range(15):
        server.submit(f"number {number}")
    server.work()
    until(lambda: {job.status for job in server.store.page(15)} == {"completed"})
    tab = open_tab().ready()
    tab.see("document.querySelectorAll('.card').length", 12)
    assert tab.page.text_content(".card-title") == "number 14"
    tab.page.get_by_role("button", name="Show more").click()
    tab.see("document.querySelectorAll('.card').length", 15)
    assert tab.page.is_hidden("#history-more")
    tab.page.locator(".card").last.scroll_into_view_if_needed()
    tab.see("document.querySelectorAll('.card img').length", 15)
    fetched = [url for url in tab.requests if "/content" in url]
    assert all(url.endswith("variant=thumbnail") for url in fetched), "no video is fetched for its thumbnail"
    # A later visit: settings are taken over with the picture, and the address names what is shown.
    # Under the pointer the still gives way to the video, which must not cost the click that is being made.
    card = tab.page.locator(".card-main").nth(3)
    card.hover()
    tab.page.mouse.down()
    tab.see("document.querySelectorAll('.card video').length", 1)
    tab.page.mouse.up()
    tab.done()
    assert tab.page.url == f"{server.url}#{server.store.page(4)[3].id}"
    tab.page.get_by_role("button", name="Use settings").click()
    tab.see("document.getElementById('prompt').value", "number 11")
    tab.see("document.getElementById('picture-size').textContent", "60 × 40")
    tab.page.click("#animate")
    tab.see("document.querySelectorAll('.card').length", 16)
    again, old = server.store.page(16)[0], server.store.page(16)[4]
    kept = [load_image(server.store.media.read(image_name(job.id))) for job in (again, old)]
    assert np.array_equal(*kept), "the picture itself, not a frame of the video"
    tab.done()
    tab.page.go_back()
    tab.page.reload()
    tab.ready().done()
    assert tab.page.text_content(".facts .prompt") == "number 11"
    assert tab.complaints == []


@browser
@pytest.mark.slow
def test_two_settings_side_by_side_in_step(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    server.work()
    tab = open_tab().ready()
    page = tab.page
    tab.ask("a boat", picture, seed=3, num_inference_steps=4)
    tab.done()
    page.get_by_role("button", name="Change", exact=True).click()
    page.get_by_label("Change", exact=True).select_option("motion_bucket")
    page.get_by_label("to", exact=True).fill("18")
    page.get_by_role("button", name="Animate and compare").click()
    tab.done(2)
    assert [row.text_content() for row in page.query_selector_all(".differences .differs")] == [
        "How much it moves (differs)718"
    ]
    first, second = server.store.page(2)[::-1]
    changed = {"motion_bucket": 18, "remixed_from_video_id": first.id}
    assert {**first.request, **changed} == second.request
    sent = [server.store.media.read(image_name(job.id)) for job in (first, second)]
    assert sent[0] == sent[1]
    times = "[...document.querySelectorAll('.screen video')].map(video => video.currentTime)"
    apart = []
    for _ in range(30):
        left, right = page.evaluate(times)
        apart.append(min(abs(left - right), FRAMES / 8 - abs(left - right)))
        time.sleep(0.05)
    assert sorted(apart)[15] < 0.06, f"seconds apart: {apart}"
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("slider", name="Frame").focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert page.evaluate(times) == [0.0625, 0.0625]
    page.get_by_role("button", name="Close A").click()
    tab.see("document.querySelectorAll('.pane').length", 1)
    assert page.text_content(".facts dd") == "18"
    # The words can be changed as well.
    page.get_by_role("button", name="Change", exact=True).click()
    assert page.input_value("#variant-value") == "a boat"
    page.get_by_label("to", exact=True).fill("a ship")
    page.get_by_role("button", name="Animate and compare").click()
    tab.done(2)
    assert [row.text_content() for row in page.query_selector_all(".differences .differs")] == [
        "What happens (differs)a boata ship"
    ]
    page.get_by_role("button", name="Close A").click()
    # From the list, too.
    page.locator(".card").nth(1).hover()
    page.locator(".card").nth(1).locator(".card-compare").click()
    tab.done(2)
    assert tab.complaints == []


@browser
def test_qualities_and_adapters_are_offered_where_there_are_any(
    open_tab: Callable[..., Tab], server: Server, picture: Path
) -> None:
    tab = open_tab().ready()
    assert tab.page.query_selector("#quality, #lora") is None
    way = partial(Sampled, solver="ddim", guidance_interval=(0.0, 1.0), reuse_features=1, motion=0.001)
    rows = (way(steps=3, passes=6.0, psnr=40.0, psnr_low=38.0), way(steps=9, passes=18.0, psnr=100.0, psnr_low=100.0))
    server.card = replace(server.card, quality=QualityTable("d" * 64, 2, rows), adapters={"snow": "a" * 64})
    tab.page.reload()
    tab.ready()
    offered = "[...document.querySelectorAll('#quality option, #lora option')].map(option => option.textContent)"
    shares = {"draft": 33, "standard": 100, "best": 100}
    work = [f"{name}, {share}\u00a0% of the work" for name, share in shares.items()]
    assert tab.page.evaluate(offered) == ["as usual", *work, "none", "snow"]
    tab.page.locator(".fold").evaluate("fold => fold.open = true")
    tab.page.get_by_label("Quality").select_option("draft")
    tab.page.get_by_label("Adapter").select_option("snow")
    tab.ask(picture=picture, num_inference_steps=4)
    told = tab.page.wait_for_selector("#form-note p, .error:visible")
    assert "quality and steps are both given" in told.text_content()
    tab.ask(picture=picture, num_inference_steps="")
    tab.page.wait_for_selector(".pane")
    (job,) = server.store.page()
    assert (job.request["num_inference_steps"], job.request["lora"]) == (3, "snow:1")
    # The steps that a quality stood for are an earlier video's settings; an adapter keeps the scale that it had.
    page = tab.page
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Use settings").first.click()
    assert [page.input_value(f"#{name}") for name in ("quality", "num_inference_steps", "lora")] == ["", "3", "snow:1"]
    assert [line for line in tab.complaints if "422" not in line] == []


@browser
def test_a_measured_control_is_a_strength_that_says_what_comes_out(
    open_tab: Callable[..., Tab], server: Server, picture: Path, tmp_path: Path
) -> None:
    """Of a method whose control is in units of its own, which nobody knows."""
    card = read_card(tiny_longer_bundle(tmp_path))
    server.card = card
    tab = open_tab().ready()
    assert tab.page.query_selector("#motion_strength") is None
    measured = {"values": [0, 1000], "curve": [0.01, 0.1], "interval": [[0.0, 0.05], [0.02, 0.2]]}
    server.card = replace(card, motion=replace(card.motion, calibration=measured))
    tab.page.reload()
    tab.ready()
    assert tab.page.is_visible("#motion_strength")
    assert "0.01 (0 to 0.02) to 0.1 (0.05 to 0.2)" in str(tab.page.text_content("#form"))
    tab.ask(picture=picture, motion_strength=1)
    tab.page.wait_for_selector(".pane")
    (job,) = server.store.page()
    assert job.request["motion_speed"] == 1000
    assert job.request["predicted_motion"] == {"mean": 0.1, "low": 0.05, "high": 0.2}
    [facts] = tab.page.evaluate(
        "import('/page/facts.js').then(({ factsOf }) => fetch('/v1/videos').then(answer => answer.json())"
        ".then(({ data }) => data.map(video => factsOf(video, null, null).textContent)))"
    )
    assert "Expected motion (1 - SSIM)0.1; nine of ten videos: 0.05 to 0.2" in facts
    assert not tab.complaints


@browser
def test_a_server_with_keys(open_tab: Callable[..., Tab], server: Server, picture: Path) -> None:
    """The page asks for the key, sends it everywhere (events and videos too), and forgets it with the tab."""
    server.stop()
    keys = KeyStore(server.store.database)
    _, token = keys.create("somebody")
    server.start(keys=keys)
    server.work()
    tab = open_tab()
    page = tab.page
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "cin_wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-error:not([hidden])")
    page.fill("#key", token)
    page.keyboard.press("Enter")
    tab.ready().ask(picture=picture, num_inference_steps=3)
    tab.done()
    tab.see("document.querySelectorAll('.card img').length", 1)
    # What is shared has no key in it, and says that one is needed.
    page.get_by_role("button", name="Share").click()
    link = page.input_value("#share-link")
    assert link == f"{server.url}#{server.store.page()[0].id}"
    assert "have the key" in page.text_content("#share-about")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as GIF").click()
    assert download.value.suggested_filename.endswith("-animation.gif")
    assert Image.open(download.value.path()).n_frames == FRAMES
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    open_tab(beside=tab).page.wait_for_selector("#key-dialog[open]")
    page.get_by_role("button", name="Forget key").click()
    page.wait_for_selector("#key-dialog[open]")


@browser
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE, {"width": 320, "height": 640}], ids=["desktop", "phone", "small"])
def test_nothing_is_wider_than_the_screen(
    open_tab: Callable[..., Tab], server: Server, picture: Path, viewport: dict[str, int]
) -> None:
    server.work()
    tab = open_tab(viewport=viewport, reduced_motion="reduce", color_scheme="dark").ready()
    wide = "document.documentElement.scrollWidth"
    assert tab.page.evaluate(wide) == viewport["width"]
    tab.ask("unbreakable" * 30, picture, num_inference_steps=2)
    tab.done()
    assert tab.page.evaluate("document.querySelector('.screen video').paused"), (
        "reduced motion: nothing moves by itself"
    )
    tab.page.click("text=Settings inside the file")
    assert tab.page.evaluate(wide) == viewport["width"]
    tab.page.get_by_role("button", name="Share").click()
    assert tab.page.evaluate(wide) == viewport["width"]
    tab.page.get_by_role("button", name="Change", exact=True).click()
    assert tab.page.evaluate(wide) == viewport["width"]
    tab.page.get_by_role("button", name="Animate and compare").click()
    tab.done(2)
    assert tab.page.evaluate(wide) == viewport["width"]
    targets = "[...document.querySelectorAll('button, a.button, input:not(.visually-hidden), select')]"
    shown = f"{targets}.filter(each => each.checkVisibility())"
    small = tab.page.evaluate(
        f"{shown}.filter(each => each.getBoundingClientRect().height < 26).map(each => each.outerHTML)"
    )
    assert small == []


@browser
def test_everything_has_a_name_and_can_be_reached_by_keyboard(
    open_tab: Callable[..., Tab], server: Server, picture: Path
) -> None:
    server.work()
    tab = open_tab().ready()
    tab.ask(picture=picture, num_inference_steps=2)
    tab.done()
    tab.see("document.querySelectorAll('.card img').length", 1)
    nameless = tab.page.evaluate(
        "[...document.querySelectorAll('button, a, input, textarea, select')].filter(each => each.checkVisibility() &&"
        "!(each.ariaLabel || each.labels?.length || each.textContent.trim())).map(each => each.outerHTML)"
    )
    assert nameless == []
    reached = set()
    tab.page.evaluate("document.activeElement.blur()")
    for _ in range(50):
        tab.page.keyboard.press("Tab")
        reached.add(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    wanted = {
        "input_reference",
        "prompt",
        "motion_bucket",
        "seed",
        "dice",
        "num_inference_steps",
        "dct_init",
        "animate",
        "count",
    }
    assert wanted | {"Download", "Share", "Change", "Use settings", "Delete"} <= reached


@pytest.mark.slow
@browser
def test_progress_where_something_between_keeps_the_stream_back(
    open_tab: Callable[..., Tab], server: Server, picture: Path
) -> None:
    server.stop()
    server.start(WithoutEvents)
    server.work()
    tab = open_tab().ready()
    tab.ask(picture=picture, num_inference_steps=LONG)
    tab.see("document.querySelector('.pane progress')?.value > 0")
    tab.done()
    assert len([url for url in tab.requests if url.endswith("/events")]) == 1


class WithoutEvents:
    """A proxy that knows no event streams."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = scope["type"] == "http" and scope["path"].endswith("/events")
        answer = refusal(501, "not_here", "no event streams here") if refused else self.app
        await answer(scope, receive, send)
