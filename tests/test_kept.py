"""What earlier versions have written is still read, bit for bit.

``tests/kept/before-controls.tar.gz`` was written by entry scripts from before methods had recipes and controls of their
own: a dataset of four clips, a LoRA checkpoint of two steps on it, the bundle exported from that, a video, a job
database with a finished and a waiting job, its recipes. Archives of versions are made by ``tests/kept/make.py``.
"""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, read_card
from cinemo.data.dataset import identity
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.methods.cinemo import CinemoControls
from cinemo.recipes import RECIPES, load_recipe
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.http.form import VideoForm, VideoRequest
from cinemo.serving.http.schema import Video
from cinemo.serving.store.admission import fingerprint
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.media import MediaStore
from cinemo.training.checkpoint.export import from_checkpoint

ENCODERS = "/tmp/kept/encoders"  # where they were
# What was another value then.
CHANGED = {
    "cinemo-320x512": ("train.micro_batch=10", "train.gradient_checkpointing=true", "train.lanes=8"),
    "cinemo-tiny": ("sample.guidance_scale=3.0", "sample.guidance_interval=[0.0, 1.0]", "sample.final_level=a_0"),
}


def unpacked(name: str, directory: Path) -> Path:
    with tarfile.open(Path(__file__).parent / "kept" / f"{name}.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    # Its frozen encoders are those of the bundle.
    recipe, card = directory / "checkpoint" / "recipe.json", directory / "checkpoint" / "checkpoint.json"
    recipe.write_text(recipe.read_text().replace(ENCODERS, str(directory / "bundle")))
    record = json.loads(card.read_text())
    record["files"]["recipe.json"] = recipe.stat().st_size
    card.write_text(json.dumps(record))
    return directory


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("before-controls", tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module", params=["before-controls", "0.1.0"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(request.param, tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_what_they_were(first: Path, name: str) -> None:
    if (first / f"{name}.json").exists():
        now = load_recipe(name, CHANGED.get(name, ()))
        assert load_recipe(str(first / f"{name}.json")) == now
        assert (first / f"{name}.json").read_text() == now.to_json()


def test_a_bundle_makes_the_same_video(kept: Path) -> None:
    bundle = load_bundle(kept / "bundle", "cpu")
    assert bundle.digest == json.loads((kept / "bundle" / "bundle.json").read_text())["digest"]
    with np.load(kept / "latents.npz") as saved:
        latents, settings = saved["latents"], json.loads(str(saved["settings"]))
    picture = np.asarray(Image.open(kept / "picture.png"))
    animation = animate(bundle, AnimateRequest(picture, "waves", motion_bucket=5, seed=3))
    np.testing.assert_allclose(animation.latents_CFHW, latents, atol=1e-4)  # on another processor
    assert animation.settings == settings


def test_a_checkpoint_is_exported_to_the_same_bundle(kept: Path, tmp_path: Path) -> None:
    from_checkpoint(str(kept / "checkpoint"), str(tmp_path / "again"))
    assert read_card(tmp_path / "again").digest == read_card(kept / "bundle").digest


def test_a_dataset_is_the_one_that_its_recipe_means(kept: Path) -> None:
    index = DatasetIndex.load(str(kept / "dataset"))
    recipe = load_recipe(
        str(kept / "checkpoint" / "recipe.json"),
        [f"encoders.{name}={kept}/bundle/{name}" for name in ("vae", "text_encoder", "tokenizer")],
    )
    assert identity.fingerprint(recipe)[0] == index.info["fingerprint"]
    samples = LatentLoader(index, global_batch=4, lanes=2, seed=0).batch(0).samples
    assert len({sample.clip_id for sample in samples}) == 4
    height, width = recipe.data.size
    assert samples[0].latents_FCHW.shape == (4, 4, height // 8, width // 8)


def test_jobs_are_shown_and_a_waiting_one_is_finished(first: Path) -> None:
    names = json.loads((first / "jobs.json").read_text())
    store = JobStore(Database(f"sqlite:///{first}/serve/serving.sqlite"), MediaStore(str(first / "serve" / "media")))
    job = store.get(names["completed"])
    assert job is not None
    shown = Video.of(job).model_dump()
    assert (shown["status"], shown["motion_bucket"], shown["num_inference_steps"]) == ("completed", 3, 3)
    assert (shown["solver"], shown["guidance_interval"]) == ("multistep", [0.1, 0.9])
    # The same form is still the same request: an Idempotency-Key from before finds its job.
    controls = CinemoControls(motion_bucket=3, seed=1, solver="multistep", guidance_interval=(0.1, 0.9), steps=3)
    asked = VideoRequest(VideoForm(prompt="waves"), controls, {}, frozenset(), seed_drawn=False)
    assert asked.asked(read_card(first / "bundle")) == job.request
    picture = store.media.read(job.files["image"])
    assert fingerprint(job.request, picture, ()) == _stored_fingerprint(store, job.id)

    runner = JobRunner(store, load_bundle(first / "bundle", "cpu"))
    runner.start()
    deadline = time.monotonic() + 60
    while (waiting := store.get(names["queued"])) and waiting.status != "completed" and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.close()
    assert waiting is not None
    assert waiting.status == "completed", waiting
    assert (waiting.request["motion_bucket"], waiting.request["dct_init"]) == (5, False)


def _stored_fingerprint(store: JobStore, job_id: str) -> Any:
    from sqlalchemy import select

    from cinemo.serving.store.tables import jobs

    (row,) = store.database.read(select(jobs.c.fingerprint).where(jobs.c.id == job_id))
    return row.fingerprint
