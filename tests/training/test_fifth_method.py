"""A method that lives elsewhere is trained, exported, animated and served by what knows no method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from small_server import always_ready, open_store, png, running

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, read_card, save_bundle
from cinemo.config import Recipe, TrainConfig
from cinemo.media.mp4 import read_metadata
from cinemo.methods import method_class
from cinemo.recipes import override, parse_recipe
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.serving.http.api import build_api
from cinemo.serving.store.jobs import JobStore
from cinemo.training.plan.estimate import plan_training
from cinemo.types import InputError
from pipelines.animate import parser
from tests.training.fifth import FifthMethod, FifthRecipe

ROOT = Path(__file__).resolve().parents[2]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.fixture
def fifth(small: Recipe) -> FifthRecipe:
    settings = {"max_steps": 6, "checkpoint_every": 3, "workers": 2, "micro_batch": 1, "held_out_shards": 1}
    kept = small.train.model_dump(exclude={"image_dropout", "motion_dropout"})
    train = TrainConfig(**(kept | settings | {"precision": "fp32", "validate_every": 3}))
    return FifthRecipe(name="fifth", data=small.data, encoders=small.encoders, diffusion=small.diffusion, train=train)


def script(name: str, *words: object) -> str:
    """Run an entry script as a user does; what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "pipelines" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.release
@pytest.mark.ray
@pytest.mark.slow
def test_from_training_to_a_served_video(
    fifth: FifthRecipe, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "recipe.json").write_text(fifth.to_json())
    output = tmp_path / "run"
    script("train", "--recipe", tmp_path / "recipe.json", "--data", dataset, "--output", output)
    assert "6," in (output / "loss.csv").read_text()
    sheets = {path.name for path in (output / "samples" / "step-000006").iterdir()}
    assert {"image-00-slow.mp4", "image-00-fast.mp4"} <= sheets

    script("export", "--checkpoint", output, "--output", tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle", "cpu")
    assert isinstance(bundle.method, FifthMethod)
    fresh = FifthMethod.fresh_networks(fifth)["painter"]
    assert not torch.equal(bundle.method.painter.paint.weight, fresh.paint.weight)

    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    words = ["--image", tmp_path / "picture.png", "--prompt", "waves", "--steps", 4, "--output", tmp_path / "out.mp4"]
    script("animate", "--bundle", tmp_path / "bundle", *words)
    assert (tmp_path / "out.mp4").stat().st_size > 0

    # Three rows of one video beside two of another that needs no text guidance: each as it is alone.
    asked = {
        "a": AnimateRequest(PICTURE, "waves", steps=4),
        "b": AnimateRequest(PICTURE, "a dog", steps=3, guidance_scale=1.0),
    }
    engine, finished = SamplingEngine(bundle), {}
    for key, request in asked.items():
        assert engine.join(key, request) == request.controls["steps"]
    while len(engine):
        outcome = engine.step()
        assert not outcome.failed
        finished |= outcome.finished
    for key, request in asked.items():
        alone = animate(bundle, request)
        assert alone.frames_FHWC.shape == (4, 32, 32, 3)
        np.testing.assert_allclose(finished[key].latents_CFHW, alone.latents_CFHW, atol=1e-4)
    with pytest.raises(InputError, match="source: fifth takes no such input; it takes image, last_image"):
        animate(bundle, AnimateRequest(PICTURE, "waves", inputs={"source": np.repeat(PICTURE[None], 4, 0)}))
    with pytest.raises(InputError, match=r"motion_bucket: fifth has no such control; it has .*pace"):
        animate(bundle, AnimateRequest(PICTURE, "waves", motion_bucket=3))


@pytest.fixture(scope="module")
def served(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, JobStore]]:
    """A server of an untrained model of the method: the HTTP interface on a real port, and a runner."""
    directory = tmp_path_factory.mktemp("served")
    recipe = FifthRecipe(name="fifth", data=small.data, encoders=small.encoders)
    torch.manual_seed(0)
    save_bundle(directory / "bundle", recipe, FifthMethod.fresh_networks(recipe), {})
    card, store = read_card(directory / "bundle"), open_store(directory)
    runner = JobRunner(store, load_bundle(directory / "bundle", "cpu"))
    runner.start()
    with running(build_api(store, lambda: card, always_ready)) as url:
        yield url, store
    runner.close()


def finished(client: httpx.Client, video: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while video["status"] in ("queued", "in_progress") and time.monotonic() < deadline:
        time.sleep(0.05)
        video = client.get(f"/v1/videos/{video['id']}").json()
    assert video["status"] == "completed", video
    return video


def test_http_takes_its_control_and_its_picture_and_nobody_else_s(served: tuple[str, JobStore], tmp_path: Path) -> None:
    url, store = served
    with httpx.Client(base_url=url, timeout=30) as client:
        model = client.get("/v1/models/fifth").json()
        names = {control["name"] for control in model["controls"]}
        assert names == {"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "pace"}
        assert model["defaults"] == {"num_inference_steps": 4, "guidance_scale": 2.0, "pace": 1.0}
        assert model["pictures"] == [{"name": "last_image", "description": "the picture to end at", "required": False}]
        assert model["motion"] == []
        document = client.get("/openapi.json").json()["components"]["schemas"]
        form = document["VideoForm"]["properties"]
        assert (form["pace"]["type"], form["pace"]["minimum"], form["pace"]["maximum"]) == ("number", 0, 4)
        assert form["last_image"]["format"] == "binary"
        assert "motion_bucket" not in form
        assert "pace" in document["Video"]["properties"]

        files = {"input_reference": ("a.png", png()), "last_image": ("b.png", png(seed=1))}
        for wrong, code in (({"pace": "9"}, "invalid_value"), ({"motion_bucket": "3"}, "unknown_field")):
            answer = client.post("/v1/videos", data={"prompt": "waves"} | wrong, files=files)
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
            assert answer.json()["error"]["param"] == next(iter(wrong))
        broken = files | {"last_image": ("b.png", b"no picture")}
        answer = client.post("/v1/videos", data={"prompt": "waves"}, files=broken)
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "last_image")

        sent = client.post("/v1/videos", data={"prompt": "waves", "pace": "2", "seed": "5"}, files=files)
        assert sent.status_code == 202, sent.text
        video = finished(client, sent.json())
        assert (video["pace"], video["seed"], video["inputs"]) == (2.0, 5, ["last_image"])
        (tmp_path / "video.mp4").write_bytes(client.get(f"/v1/videos/{video['id']}/content").content)
        settings = json.loads(read_metadata(tmp_path / "video.mp4")["comment"])
        assert (settings["pace"], settings["steps"]) == (2.0, 4)
        assert settings["last_image_sha256"] != settings["image_sha256"]
        # The same without the second picture is another request, and another video.
        alone = {"input_reference": files["input_reference"]}
        other = finished(client, client.post("/v1/videos", data={"prompt": "waves", "seed": "5"}, files=alone).json())
        assert store.get(other["id"]).files.keys() == {"image"}  # type: ignore[union-attr]


@pytest.mark.browser
def test_the_page_shows_its_control(served: tuple[str, JobStore], chromium: Any, tmp_path: Path) -> None:
    url, _ = served
    picture = tmp_path / "picture.png"
    picture.write_bytes(png())
    page = chromium.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#animate:enabled")
    assert page.get_by_label("Pace").get_attribute("placeholder") == "1"
    assert page.query_selector("#motion-chart") is None
    assert page.query_selector("#last_image") is not None
    page.set_input_files("#input_reference", picture)
    page.wait_for_selector("#drop.filled")
    page.fill("#prompt", "waves")
    page.fill("#pace", "9")
    page.click("#animate")
    page.wait_for_selector("#pace-error:not([hidden])")
    assert "a number from 0 to 4" in page.text_content("#pace-error")
    page.fill("#pace", "0.5")
    page.set_input_files("#last_image", picture)
    page.click("#animate")
    page.wait_for_selector(".pane .screen video", timeout=60_000)
    facts = page.text_content("#stage-settings")
    assert "Pace0.5" in facts
    assert "Motion" not in facts
    assert not complaints
    page.close()


def test_flags_are_its_own() -> None:
    text = parser(FifthMethod).format_help()
    assert "--pace" in text
    assert "--last-image FILE" in text
    assert not {"--motion-bucket", "--no-dct-init", "--source-video", "--solver"} & set(text.split())


def test_a_recipe_part_of_another_method_is_one_line(fifth: FifthRecipe) -> None:
    with pytest.raises(InputError, match=r"model\.norm_num_groups.*; model of method .* has channels, text_width"):
        parse_recipe(fifth.model_dump(mode="json") | {"model": {"norm_num_groups": 4}}, "recipe x.json")
    with pytest.raises(InputError, match=r"unknown key 'sample\.motion_bucket'; sample of method .* has steps, .*pace"):
        override(fifth, ["sample.motion_bucket=3"])
    with pytest.raises(InputError, match=r"model\.channels: Extra inputs"):
        override(fifth, ["method=cinemo"])


def test_its_training_is_planned(fifth: FifthRecipe) -> None:
    plan = plan_training(fifth, "A100-80GB", None, None)
    painter = FifthMethod.fresh_networks(fifth)["painter"]
    assert plan["parameters"]["total"] == sum(parameter.numel() for parameter in painter.parameters())


def test_a_name_that_is_no_method_is_refused(small: Recipe) -> None:
    for name in ("sixth", "tests.training.fifth:Painter", "tests.training.fifth:Nobody"):
        with pytest.raises(InputError, match=r"expected one of cinemo, .*, or package\.module:Class of a Method"):
            method_class(small.model_copy(update={"method": name}))
    for name in ("nowhere:Method", ":Method", "..up:Method"):
        with pytest.raises(InputError, match=f"'{name}', which cannot be imported"):
            method_class(small.model_copy(update={"method": name}))
