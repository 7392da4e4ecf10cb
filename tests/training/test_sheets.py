"""A contact sheet shows the first samples of a dataset, each with its truth and two animations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_dataset

from cinemo.config import Recipe
from cinemo.data.dataset import sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe, read_frames
from cinemo.methods import build_method
from cinemo.networks.frozen import Vae
from cinemo.training.report import sheets
from cinemo.training.run.batch import FrozenStates
from cinemo.types import RunError


def test_first_samples(dataset: str) -> None:
    index = DatasetIndex.load(dataset)
    assert [sample.key for sample in sheets.first_samples(index, 2)] == ["clip000_0", "clip001_0"]
    assert len(sheets.first_samples(index, 50)) == 4  # what its first shard holds
    assert [sample.key for sample in sheets.first_samples(index, 2, held_out_shards=1)] == ["clip008_0", "clip009_0"]
    assert [sample.key for sample in sheets.first_samples(index, 1, held_out_shards=2)] == ["clip004_0"]


def test_held_out_shards_may_be_empty(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, (4, 4, 4, 4), sizes=(3, 2, 0))
    index = DatasetIndex.load(str(root))
    assert [sample.key for sample in sheets.first_samples(index, 1, held_out_shards=2)] == ["clip-3"]
    assert [sample.key for sample in sheets.first_samples(index, 1, held_out_shards=1)] == ["clip-0"]


def test_samples_carry_what_their_method_reads(tmp_path: Path) -> None:
    root = str(write_dataset(tmp_path, (4, 4, 4, 4), sizes=(2, 2)))
    index = DatasetIndex.load(root)
    store = sidecars.FieldStore(root, "flow", "f" * 16, {}, None)
    store.begin()
    for shard, digest in zip(index.shards, index.table["checksum"].to_pylist(), strict=True):
        values = {
            f"clip-{number}": sidecars.array_bytes(np.full((3, 2, 4, 4), number, np.float16))
            for number in (2 * shard, 2 * shard + 1)
        }
        sidecars.commit(root, "flow", shard, digest, values, {}, "f" * 16)
    store.finish(index.shards)
    (sample,) = sheets.first_samples(index, 1, 1, ("flow",))
    assert (sample.key, float(sample.fields["flow"][0, 0, 0, 0])) == ("clip-2", 2.0)
    (Path(root) / "shards" / "shard-000001.tar").unlink()
    assert [sample.key for sample in sheets.first_samples(index, 1, 1, ("flow",))] == ["clip-0"]
    (Path(root) / "shards" / "shard-000000.tar").unlink()
    with pytest.raises(RunError, match="every shard is damaged or missing"):
        sheets.first_samples(index, 1, 1, ("flow",))


def test_a_sheet_and_its_videos(dataset: str, small: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = sheets.first_samples(DatasetIndex.load(dataset), 2)
    text = FrozenStates.of(small)
    method = build_method(small).eval()
    torch.nn.init.normal_(method.unet.add_embedding.linear_2.weight)  # zero in a fresh network: buckets have no effect
    made = sheets.sheet_latents(small, method, text, samples, torch.device("cpu"))
    assert [video.shape for video in made] == [(2, 4, 4, 4, 4)] * 2
    for sample, video_BCFHW in zip(samples, made, strict=True):
        first_CHW = torch.from_numpy(sample.latents_FCHW[0].astype(np.float32))
        assert torch.equal(video_BCFHW[0, :, 0], first_CHW)
        assert torch.isfinite(video_BCFHW).all()
        assert not torch.equal(video_BCFHW[0, :, 1:], video_BCFHW[1, :, 1:])  # the buckets differ
    again = sheets.sheet_latents(small, method, text, samples[1:], torch.device("cpu"))
    assert torch.allclose(again[0], made[1], atol=1e-5)

    vae = Vae(small.encoders.vae)
    sheet = sheets.write_samples(str(tmp_path), small, 100, vae, samples, made)
    uris = sheet.uris
    assert [uri.removeprefix(f"{tmp_path}/samples/") for uri in uris] == [
        "step-000100.png",
        *(f"step-000100/image-0{image}-bucket-{bucket}.mp4" for image in (0, 1) for bucket in ("03", "16")),
    ]
    info = probe(uris[4])
    assert (info.frames, info.height, info.width) == (4, 32, 32)
    settings = json.loads(read_metadata(uris[4])["comment"])
    assert settings | {"step": 100, "sample": "clip001_0", "motion_bucket": 16, "prompt": "a red car"} == settings
    shown = read_frames(uris[4], range(4)).astype(float)
    frames = sheets.decoded(small, vae, samples, made)
    away = {(i, k): np.abs(shown - one).mean() for i, rows in enumerate(frames) for k, one in enumerate(rows)}
    assert min(away, key=away.__getitem__) == (1, 2)  # nothing else is as near: second image, high bucket

    assert (sheet.step, list(sheet.motion)) == (100, ["clips", "bucket-03", "bucket-16"])
    assert sheet.motion["bucket-16"] == pytest.approx(
        np.mean([1 - mean_adjacent_ssim(videos[2]) for videos in frames]), abs=1e-6
    )

    image = Image.open(uris[0])
    assert image.size == (4 * 34 - 2, 6 * (32 + 13 + 2) - 2)
    pixels = np.asarray(image)
    assert np.array_equal(
        pixels[13:45, :32], pixels[47 + 13 : 47 + 45, :32]
    )  # all rows begin with the true first frame
    assert (pixels[:13] < 128).any()  # a label
