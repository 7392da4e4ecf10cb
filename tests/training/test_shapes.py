"""Training on samples of several shapes: what a batch is, which networks take which; and a whole run, killed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data.small_data import digests, film
from training.jobs import Job

from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex, pixels
from cinemo.data.dataset.verify import verify
from cinemo.data.loading.source import Source
from cinemo.data.manifest.manifest import read_manifest
from cinemo.data.precompute import stages
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.graph import run
from cinemo.data.precompute.plan import Plan, make_plan
from cinemo.data.precompute.probing import extents_of
from cinemo.media.mp4 import write_video
from cinemo.methods import build_method, method_class
from cinemo.recipes import load_recipe, override
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log
from cinemo.training.run.batch import FrozenStates, _blank_field, host_batch, latent_shape, on_device
from cinemo.training.run.dataset_check import check_canary, check_dataset
from cinemo.training.run.growth import TrainingData
from cinemo.types import Clip, InputError, LatentSample

ROOT = Path(__file__).resolve().parents[2]


def samples_of(recipe: Recipe, count: int = 2) -> list[LatentSample]:
    """Of a recipe of one shape."""
    rng = np.random.default_rng(3)
    fields = {field: _blank_field(recipe, field) for field in method_class(recipe).stored_fields(recipe)}
    return [
        LatentSample(
            key=f"k{number}",
            clip_id="c",
            uri="",
            caption="a",
            latents_FCHW=rng.normal(size=latent_shape(recipe)).astype(np.float16),
            ssim=0.5,
            fps=24.0,
            frame_interval=3,
            start_frame=0,
            fields=fields,
        )
        for number in range(count)
    ]


def test_a_batch_is_what_the_recipe_of_its_shape_makes(small: Recipe) -> None:
    recipe = override(small, ["data.other_shapes=[[4,64,32],[3,32,32]]"])
    for shape in recipe.data.shapes:
        alone = recipe.of_shape(shape)
        samples = samples_of(alone)
        made, expected = host_batch(samples, 5, recipe), host_batch(samples, 5, alone)
        assert made.video_BCFHW.shape == (2, 4, shape[0], shape[1] // 8, shape[2] // 8)
        for name in ("video_BCFHW", "noise_BCFHW", "t_B"):
            torch.testing.assert_close(getattr(made, name), getattr(expected, name), rtol=0, atol=0)
    foreign, wide = override(small, ["data.size=[32,48]"]), samples_of(recipe.of_shape((4, 64, 32)))
    assert method_class(recipe).sized(recipe, (64, 32)).data.shapes == ((4, 64, 32),)  # one to be sampled
    with pytest.raises(InputError, match=r"latents are 4x4x4x6, recipe cinemo-tiny expects 4x4x4x4"):
        host_batch(samples_of(foreign), 5, recipe)
    with pytest.raises(InputError, match=r"latents are 4x4x4x4, recipe cinemo-tiny expects 4x4x8x4"):
        host_batch([wide[0], *samples_of(small)], 5, recipe)


def test_a_network_of_one_length_refuses_others() -> None:
    recipe = load_recipe("dynamicrafter-tiny")
    assert len(override(recipe, ["data.other_shapes=[[16,96,64]]"]).data.shapes) == 2
    with pytest.raises(
        InputError, match=r"other_shapes has \[8, 64, 96\]: model.resampler.video_length is 16, expected"
    ):
        override(recipe, ["data.other_shapes=[[8,64,96]]"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cinemo-tiny", "dynamicrafter-tiny", "trip-tiny", "longer-tiny"])
def test_every_method_learns_from_every_shape(name: str) -> None:
    lengths = "" if name == "dynamicrafter-tiny" else ",[8,64,96]"
    recipe = override(load_recipe(name), [f"data.other_shapes=[[16,96,64]{lengths}]"])
    method, frozen = build_method(recipe), FrozenStates.of(recipe)
    for shape in recipe.data.shapes:
        batch = host_batch(samples_of(recipe.of_shape(shape)), 3, recipe)
        assert batch.video_BCFHW.shape[2:] == (shape[0], shape[1] // 8, shape[2] // 8)
        loss = method(*on_device(batch, frozen, torch.device("cpu"), torch.float32))
        loss.backward()
        assert torch.isfinite(loss)


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    """cinemo-tiny, which also makes tall and short videos."""
    changes = ["data.other_shapes=[[16,96,64],[8,64,96]]", "data.clips_per_shard=3"]
    return override(load_recipe("cinemo-tiny"), changes)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight wide, eight tall and eight short ones; nothing but the files says which."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = ((60, 72, 108), (60, 108, 72), (30, 72, 108))
    for number in range(24):
        write_video(folder / f"{number:02d}.mp4", film(str(number), *kinds[number % 3]), 25)
        (folder / f"{number:02d}.txt").write_text(f"film {number}")
    return folder


@pytest.fixture(scope="module")
def made(ray_session: None, tiny: Recipe, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "dataset"
    summary = run(tiny, str(videos), str(directory))
    assert [one["samples"] for one in summary["shapes"]] == [8, 8, 8]
    return directory


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_was_killed_ends_in_the_same_bytes(made: Path, tiny: Recipe, videos: Path, tmp_path: Path) -> None:
    index = DatasetIndex.load(str(made))
    assert {pixels(shape) for shape in index.latent_shapes} == set(tiny.data.shapes)
    assert verify(str(made), tiny, 6)["canary"]["equal"] == 6
    check_dataset(index, tiny)
    assert "2 equal bit for bit" in check_canary(index, tiny)
    with pytest.raises(InputError, match=r"was not made by recipe cinemo-tiny: other_shapes is \[\[16, 96, 64\]"):
        check_dataset(index, load_recipe("cinemo-tiny"))

    (tmp_path / "recipe.json").write_text(tiny.to_json())
    command = [
        sys.executable, str(ROOT / "pipelines/precompute.py"), "--recipe", str(tmp_path / "recipe.json"),
        "--manifest", str(videos), "--output", str(tmp_path / "killed"),
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("killed/shards/*.json")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (tmp_path / "killed/parts/part-000000.parquet").rename(tmp_path / "parts")  # without which nothing goes on
    with pytest.raises(InputError, match="nothing else says which clips are planned for which shard"):
        run(tiny, str(videos), str(tmp_path / "killed"))
    (tmp_path / "parts").rename(tmp_path / "killed/parts/part-000000.parquet")
    run(tiny, str(videos), str(tmp_path / "killed"), break_lock=True)
    assert digests(tmp_path / "killed") == digests(made)


def read_here(plan: Plan, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    clips = plan.clips.clips_at(rows).to_pylist()
    yield rows, np.array(extents_of([Clip(**clip) for clip in clips], 60))


def precomputed(recipe: Recipe, videos: Path, output: Path) -> str:
    """What `graph.run` makes, without Ray around the stages."""
    made = Dataset.open(str(output), recipe, make_plan(read_manifest(str(videos)), recipe))
    made.load()
    made.shape_clips(read_here)
    made.begin()
    encoder = stages.Encoder(recipe.data, recipe.encoders.vae, recipe.encoders.latent, "float32")
    for number in made.missing_shards():
        scored = stages.score(stages.decode(made.plan.rows([number]).slice(), recipe.data), recipe.data)
        (total,) = stages.commit(encoder(scored), made.uri, made.fingerprint, recipe.data.views).to_pylist()
        made.committed(json.loads(total["index"]))
    made.finish(made.summarize())
    return made.uri


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.release
def test_a_training_on_several_shapes_is_killed_and_goes_on(tiny: Recipe, videos: Path, tmp_path: Path) -> None:
    """With fewer workers: the samples of the canonical order, each batch of one shape."""
    made, steps, output = precomputed(tiny, videos, tmp_path / "data"), 60, tmp_path / "run"
    workers = ["train.workers=2", "train.lanes=4", "train.global_batch=4", "train.micro_batch=2", "train.canary=0"]
    often = [f"train.max_steps={steps}", "train.checkpoint_every=2", "train.sample_every=0", "train.validate_every=0"]
    recipe = override(tiny, [*workers, *often, "train.held_out_shards=2"])
    job = Job(recipe, made, output, tmp_path / "first.log")
    job.wait_for(lambda: (card := checkpoints.latest(str(output))) is not None and card.step >= 2)
    job.kill_all()
    killed = checkpoints.latest(str(output))
    assert killed is not None
    assert killed.step < steps
    job = Job(override(recipe, ["train.workers=1"]), made, output, tmp_path / "second.log")
    assert job.process.wait() == 0, job.log.read_text()
    index = DatasetIndex.load(made)
    loader = TrainingData([Source(made)], [index], [[(0, len(index.shards))]], recipe.train).loader
    batches = [loader.at(step).batch(step).samples for step in range(steps)]
    assert sample_log.read(str(output)) == {step: [one.key for one in batch] for step, batch in enumerate(batches)}
    shapes = [{one.latents_FCHW.shape for one in batch} for batch in batches]
    assert all(len(found) == 1 for found in shapes)
    assert len(set.union(*shapes)) > 1
