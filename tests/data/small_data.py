"""Films, samples and finished datasets of a few kilobytes, for the tests of this room."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np

from cinemo import storage
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.types import LatentSample, Refusal, keyed_seed

LATENT_SHAPE = (6, 4, 4, 6)


def digests(dataset: Path) -> dict[str, str]:
    """sha256 of every file of a dataset; without the report for people, which tells how long a run took."""
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and path.relative_to(dataset) != Path("report.html")
    }


def stamps(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}


def film(name: str, frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Something smooth and different for every name, drifting to the right."""
    generator = np.random.default_rng(keyed_seed(0, name))
    wide = cv2.resize(generator.integers(0, 256, (5, 20, 3), np.uint8), (width + frames, height))
    return np.stack([wide[:, k : k + width] for k in range(frames)])


def make_dataset(directory: Path, sizes: list[int], fingerprint: str = "f" * 64, views: int = 1) -> DatasetIndex:
    """A finished dataset with shards of given sizes (clips); a sample holds latents that are drawn from its key."""
    records = []
    position = 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            samples += [make_sample(position, view) for view in range(views)]
            position += 1
        refusals = [Refusal(f"bad-{shard}", "nowhere.mp4", "open", "missing", "no such file")] if shard == 1 else []
        records.append(shards.commit(str(directory), shard, samples, refusals, fingerprint))
    (directory / "index.parquet").write_bytes(shards.index_bytes(records))
    info = {"schema": shards.SCHEMA_VERSION, "complete": True, "samples": sum(sizes) * views, "quarantined": 1}
    info |= {"latent_shape": list(LATENT_SHAPE), "recipe": {"data": {"views": views}}}
    storage.write_json(str(directory / "dataset.json"), info)
    return DatasetIndex.load(str(directory))


def make_sample(position: int, view: int = 0) -> LatentSample:
    generator = np.random.default_rng([position, view] if view else position)
    return LatentSample(
        key=f"{position:09d}-{view}",
        clip_id=f"clip.{position}/ü",
        uri=f"/clips/{position}.mp4",
        caption=f"caption {position}",
        latents_FCHW=generator.normal(size=LATENT_SHAPE).astype(np.float16),
        ssim=float(generator.uniform(0.2, 1)),
        fps=24.0,
        frame_interval=3,
        start_frame=position,
        view=view,
    )
