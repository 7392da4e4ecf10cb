"""A contact sheet shows the first samples of a dataset, each with its truth and two animations."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from cinemo.config import Recipe
from cinemo.data.shards import DatasetIndex
from cinemo.methods import build_method
from cinemo.networks.frozen import TextEncoder, Vae
from cinemo.training import sheets
from cinemo.training.batch import TextStates


def test_first_samples(dataset: str) -> None:
    index = DatasetIndex.load(dataset)
    assert [sample.key for sample in sheets.first_samples(index, 2)] == ["clip000_0", "clip001_0"]
    assert len(sheets.first_samples(index, 50)) == 4  # what its first shard holds


def test_a_sheet(dataset: str, small: Recipe) -> None:
    torch.manual_seed(0)
    samples = sheets.first_samples(DatasetIndex.load(dataset), 2)
    text = TextStates(TextEncoder(small.encoders.text_encoder, small.encoders.tokenizer))
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

    image = Image.open(io.BytesIO(sheets.draw_sheet(small, Vae(small.encoders.vae), samples, made)))
    assert image.size == (4 * 34 - 2, 6 * (32 + 13 + 2) - 2)
    pixels = np.asarray(image)
    assert np.array_equal(
        pixels[13:45, :32], pixels[47 + 13 : 47 + 45, :32]
    )  # all rows begin with the true first frame
    assert (pixels[:13] < 128).any()  # a label
