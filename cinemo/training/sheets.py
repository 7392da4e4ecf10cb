"""Contact sheets: what the network makes of a few fixed samples, beside the truth, as one PNG.

Rows: for each sample its own frames (decoded latents), then animations of its first frame at a low and a high motion
bucket. Columns: frames. The noise is keyed by the sample alone, so that sheets of different steps compare.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from cinemo import storage
from cinemo.animate import sample_latents
from cinemo.config import Recipe
from cinemo.data.shards import DatasetIndex, Members, read_sample, record_uri, tar_uri
from cinemo.media.motion import motion_bucket
from cinemo.methods.cinemo import CinemoMethod
from cinemo.networks.frozen import Vae
from cinemo.training.batch import TextStates
from cinemo.types import Condition, LatentSample, keyed_generator

BUCKETS = (3, 16)
STEPS = 20
_LABEL, _GAP, _COLUMNS = 13, 2, 8


def first_samples(index: DatasetIndex, count: int) -> list[LatentSample]:
    """The first ``count`` samples of a dataset (of its first shard, where that holds fewer)."""
    sizes = zip(index.shards, index.samples_of_shards, strict=True)
    shard = next(number for number, samples in sizes if samples)
    members = Members(**storage.read_json(record_uri(index.uri, shard))["members"])
    count = min(count, len(members.keys))
    size = 2 * int(np.prod(members.array_shape))
    head = memoryview(storage.read_bytes(tar_uri(index.uri, shard), 0, members.array_offset[count - 1] + size))
    return [read_sample(head, members, place) for place in range(count)]


def sheet_latents(
    recipe: Recipe, method: CinemoMethod, text: TextStates, samples: Sequence[LatentSample], device: torch.device
) -> list[torch.Tensor]:
    """Animated latents (len(BUCKETS), C, F, h, w) of each sample's first frame. Under ZeRO-3 every rank calls this."""
    made = []
    for sample in samples:
        first_CHW = torch.from_numpy(np.array(sample.latents_FCHW[0])).float().to(device)
        states_BLD = text([sample.caption, ""])
        generator = keyed_generator(recipe.train.seed, "sheet", sample.key)
        noise_CFHW = torch.randn(first_CHW.shape[0], recipe.data.frames - 1, *first_CHW.shape[1:], generator=generator)
        count = len(BUCKETS)
        condition = Condition(
            first_CHW.expand(count, -1, -1, -1),
            states_BLD[:1].expand(count, -1, -1),
            torch.tensor(BUCKETS, dtype=torch.float32, device=device),
        )
        with torch.no_grad():
            video_BCFHW = sample_latents(
                method,
                condition,
                states_BLD[1:].expand(count, -1, -1),
                noise_CFHW.to(device).expand(count, -1, -1, -1, -1),
                STEPS,
                recipe.sample.guidance_scale,
            )
        made.append(video_BCFHW)
    return made


def draw_sheet(recipe: Recipe, vae: Vae, samples: Sequence[LatentSample], animated: Sequence[torch.Tensor]) -> bytes:
    """The PNG of `sheet_latents`' result with the truth above each."""
    rows: list[tuple[str, np.ndarray]] = []
    for sample, video_BCFHW in zip(samples, animated, strict=True):
        truth_CFHW = torch.from_numpy(np.array(sample.latents_FCHW)).float().transpose(0, 1).to(video_BCFHW.device)
        bucket = motion_bucket(sample.ssim, recipe.data.bucket_edges)
        with torch.no_grad():
            frames = [vae.decode(latents.transpose(0, 1)) for latents in (truth_CFHW, *video_BCFHW)]
        rows.append((f"{sample.clip_id}: {sample.caption[:60]} (true, bucket {bucket})", frames[0]))
        rows += [(f"bucket {bucket}", made) for bucket, made in zip(BUCKETS, frames[1:], strict=True)]
    height, width = recipe.data.size
    chosen = np.linspace(0, recipe.data.frames - 1, min(_COLUMNS, recipe.data.frames)).round().astype(int)
    sheet = Image.new(
        "RGB", (len(chosen) * (width + _GAP) - _GAP, len(rows) * (height + _LABEL + _GAP) - _GAP), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for row, (label, frames_FHWC) in enumerate(rows):
        top = row * (height + _LABEL + _GAP)
        pen.text((2, top), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, frame in enumerate(chosen):
            sheet.paste(Image.fromarray(frames_FHWC[frame]), (column * (width + _GAP), top + _LABEL))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
