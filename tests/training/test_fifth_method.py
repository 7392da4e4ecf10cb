"""A method that lives elsewhere is trained, exported, animated and served by what knows no method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle
from cinemo.config import Recipe, TrainConfig
from cinemo.methods import method_class
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.training.plan.estimate import plan_training
from cinemo.types import InputError
from tests.training.fifth import HERE, FifthMethod

ROOT = Path(__file__).resolve().parents[2]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.fixture
def fifth(small: Recipe) -> Recipe:
    settings = {"max_steps": 6, "checkpoint_every": 3, "workers": 2, "micro_batch": 1, "held_out_shards": 1}
    train = TrainConfig(**(small.train.model_dump() | settings | {"precision": "fp32", "validate_every": 3}))
    return small.model_copy(update={"method": HERE, "train": train})


def script(name: str, *words: object) -> str:
    """Run an entry script as a user does; what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "pipelines" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_from_training_to_a_served_video(
    fifth: Recipe, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        assert engine.join(key, request) == request.steps
    while len(engine):
        outcome = engine.step()
        assert not outcome.failed
        finished |= outcome.finished
    for key, request in asked.items():
        alone = animate(bundle, request)
        assert alone.frames_FHWC.shape == (4, 32, 32, 3)
        np.testing.assert_allclose(finished[key].latents_CFHW, alone.latents_CFHW, atol=1e-4)
    with pytest.raises(InputError, match="method fifth takes a picture, got image, source"):
        animate(bundle, AnimateRequest(PICTURE, "waves", source=np.repeat(PICTURE[None], 4, 0)))


def test_its_training_is_planned(fifth: Recipe) -> None:
    plan = plan_training(fifth, "A100-80GB", None, None)
    painter = FifthMethod.fresh_networks(fifth)["painter"]
    assert plan["parameters"]["total"] == sum(parameter.numel() for parameter in painter.parameters())


def test_a_name_that_is_no_method_is_refused(small: Recipe) -> None:
    for name in ("sixth", "tests.training.fifth:Painter", "tests.training.fifth:Nobody"):
        with pytest.raises(InputError, match=r"expected one of cinemo, or package\.module:Class of a Method"):
            method_class(small.model_copy(update={"method": name}))
    for name in ("nowhere:Method", ":Method", "..up:Method"):
        with pytest.raises(InputError, match=f"'{name}', which cannot be imported"):
            method_class(small.model_copy(update={"method": name}))
