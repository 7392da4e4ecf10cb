"""The tiny recipe of every other method through all entry points, from clips to a served video; one of them is killed
while it trains, and resumed.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from serving.process import Server

from cinemo.media.mp4 import read_metadata
from cinemo.media.synthetic import render_clips
from cinemo.media.video import probe, read_frames
from cinemo.methods import method_class
from cinemo.networks.weights import resolve
from cinemo.recipes import load_recipe
from tests.pipelines.test_chain import ROOT, main_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Sister:
    """``asked``: a control that the method has, and a value of it that is not the default. ``wrong``: flags that it has
    not, and what is said about them. ``killed``: its training, a process of its own with its Ray, once, after its first
    checkpoint."""

    recipe: str
    asked: Mapping[str, Any]
    killed: bool = False
    wrong: tuple[str, ...] = ("--motion-bucket", "3")
    said: str = "has no such control; it has"


SISTERS = (
    Sister("dynamicrafter-tiny", {"frame_rate": 9}),
    Sister("trip-tiny", {"guidance_scale": 4.0}, killed=True),
    Sister("longer-tiny", {"motion_speed": 900}),
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_clips(tmp_path_factory.mktemp("clips"), count=8, seed=7, size=(72, 104), frames=160)


@pytest.mark.parametrize("sister", [pytest.param(sister, id=sister.recipe) for sister in SISTERS])
def test_from_clips_to_a_served_video(
    sister: Sister, ray_session: None, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(sister.recipe)
    dataset, run, bundle = tmp_path / "dataset", tmp_path / "run", tmp_path / "bundle"
    named = ["--recipe", sister.recipe]
    small = ["--set", "data.clips_per_shard=4", "--set", "data.encode_actors=1"]
    main_of("precompute", capfd, *named, "--manifest", clips, "--output", dataset, *small)
    stored = {path.name for path in (dataset / "fields").glob("*.json")} if (dataset / "fields").is_dir() else set()
    assert stored == {f"{name}.json" for name in method_class(recipe).stored_fields(recipe)}

    train = [
        *named, "--data", dataset, "--output", run, "--max-steps", "4",
        "--set", "train.global_batch=4", "--set", "train.micro_batch=2", "--set", "train.checkpoint_every=2",
        "--set", "train.log_every=1", "--set", "train.sample_every=0", "--set", "sample.steps=4",
    ]  # fmt: skip
    assert (recipe.train.workers, recipe.train.zero_stage) == (2, 2)
    if sister.killed:
        kill_after_a_checkpoint(train, run)
        assert not (run / "train.json").exists()
    main_of("train", capfd, *train)
    with (run / "loss.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("1234")
    assert list((run / "samples").glob("step-000004.png"))

    main_of("export", capfd, "--checkpoint", run, "--output", bundle)
    PIL.Image.fromarray(read_frames(sorted(clips.parent.glob("*.mp4"))[0], [0])[0]).save(tmp_path / "picture.png")
    words = ["--bundle", bundle, "--image", tmp_path / "picture.png", "--prompt", "a ball", "--steps", "3"]
    flags = [part for name, value in sister.asked.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for name in ("a", "b"):
        stored = ["--output", tmp_path / f"{name}.mp4", "--save-latents", tmp_path / f"{name}.npz"]
        main_of("animate", capfd, *words, *flags, *stored)
    frames, (height, width) = recipe.data.frames, recipe.data.size
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width) == (frames, height, width)
    settings = json.loads(read_metadata(tmp_path / "a.mp4")["comment"])
    assert settings["recipe"] == sister.recipe
    assert settings.items() >= sister.asked.items()
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{name}.npz")["latents"] for name in ("a", "b")))
    refused = main_of("animate", capfd, *words, *sister.wrong, "--output", tmp_path / "c.mp4", code=2)
    assert sister.said in refused
    assert len(refused.strip().splitlines()) == 1, refused

    port = free_port()
    server = Server(
        ["pipelines/serve.py", "--bundle", bundle, "--port", str(port), "--state", tmp_path / "state"], port
    )
    try:
        asked = {name: str(value) for name, value in sister.asked.items()} | {"num_inference_steps": "2"}
        video = server.wait(server.submit(**asked))
        assert video["status"] == "completed", video
        assert video.items() >= sister.asked.items()
        answer = server.post(motion_bucket="3")
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "motion_bucket")
    except BaseException:
        server.kill()
        raise
    server.stop()


@pytest.mark.release
def test_a_refinement_network_is_trained_beside_a_frozen_model(
    ray_session: None, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From stored flow and first frames, by the trainer of everything else; the model stays what it was, to the bit."""
    dataset, run, bundle = tmp_path / "dataset", tmp_path / "run", tmp_path / "bundle"
    named = ["--recipe", "longer-tiny-refiner"]
    main_of("precompute", capfd, *named, "--manifest", clips, "--output", dataset, "--set", "data.clips_per_shard=4")
    small = ["--set", "train.global_batch=4", "--set", "train.micro_batch=2", "--set", "train.lr=0.002"]
    main_of("train", capfd, *named, "--data", dataset, "--output", run, "--max-steps", "6", *small)
    main_of("export", capfd, "--checkpoint", run, "--output", bundle)
    init = str(load_recipe("longer-tiny-refiner").train.init)
    before, after = (tensors(resolve(init) / "unet"), tensors(bundle / "unet"))
    assert all(torch.equal(value.float(), after[name]) for name, value in before.items() if "rotary" not in name)
    learnt = tensors(bundle / "refiner")
    assert learnt["exit.weight"].abs().max() > 0
    picture = PIL.Image.fromarray(read_frames(sorted(clips.parent.glob("*.mp4"))[0], [0])[0])
    picture.save(tmp_path / "picture.png")
    words = ["--bundle", bundle, "--image", tmp_path / "picture.png", "--prompt", "", "--steps", "2"]
    main_of("animate", capfd, *words, "--arrow", "20,20,60,20", "--output", tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").frames == 16


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def kill_after_a_checkpoint(words: list[Any], run: Path, seconds: float = 240) -> None:
    """Start a training and SIGKILL all of it once a checkpoint is there."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    log = run.parent / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "pipelines/train.py", *map(str, words)],
            cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=output,
        )  # fmt: skip
    deadline = time.monotonic() + seconds
    while not list(run.rglob("checkpoint.json")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
