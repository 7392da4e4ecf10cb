"""A recipe that runs in moments, and a folder of clips in which some cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.small_data import film
from tiny import save_encoders, save_image_encoder

from cinemo.config import DataConfig, Recipe
from cinemo.data.precompute.graph import run
from cinemo.media.mp4 import write_video
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_tiny


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoders")
    save_encoders(directory)
    return directory


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP image model of 32x32 pixels: 17 tokens of width 32."""
    directory = tmp_path_factory.mktemp("image_encoder")
    save_image_encoder(directory)
    return directory


@pytest.fixture(scope="session")
def field_recipe(small_recipe: Recipe, image_encoder: Path) -> Recipe:
    """Two views of a clip, and every field there is."""
    fields = '["text_states", "first_frame", "frames", "image_tokens", "frame_tokens", "flow"]'
    changes = ["data.views=2", f"encoders.image_encoder={image_encoder}", f"data.fields={fields}"]
    return override(small_recipe, changes)


@pytest.fixture(scope="session")
def with_fields(
    ray_ends: None, s3_endpoint: str, clips_folder: Path, field_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A dataset of two views of nine films in three shards, with all fields. Copy it before changing it."""
    directory = tmp_path_factory.mktemp("finished") / "dataset"
    run(field_recipe, str(clips_folder), str(directory))
    return directory


@pytest.fixture(scope="session")
def small_recipe(encoders: Path) -> Recipe:
    """6 frames of 32x48 at interval 1-3, four clips a shard, a random VAE, samples of its posterior."""
    return override(
        cinemo_tiny(),
        [
            "data.frames=6",
            "data.size=[32,48]",
            "data.frame_interval=[1,3]",
            "data.clips_per_shard=4",
            "data.encode_actors=1",  # another costs ten seconds of imports
            f"encoders.vae={encoders / 'vae'}",
            "encoders.latent=sample",
            f"data.bucket_edges={list(DataConfig().bucket_edges)}",
        ],
    )


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files: nine films, a text in disguise, an empty file and a film that is too short."""
    directory = tmp_path_factory.mktemp("clips")
    for number in range(9):
        write_video(directory / f"film {number}.mp4", film(str(number), 20 + number), 25)
    (directory / "film 1b.mp4").write_bytes(b"no video at all " * 50)
    (directory / "film 3b.mp4").write_bytes(b"")
    write_video(directory / "film 5b.mp4", film("short", 3), 25)
    for video in directory.glob("*.mp4"):
        video.with_suffix(".txt").write_text(f"{video.stem}\n")
    (directory / "film 2.txt").write_text("a caption\nfrom a sidecar\n")
    return directory
