"""What the network makes of a few fixed samples: a contact sheet beside the truth, and every animation as an mp4.

Rows of a sheet: for each sample its own frames (decoded latents), then animations of its first frame, one for each of
the method's ``variants`` (Cinemo: a low and a high motion bucket). Columns: frames. The noise is keyed by the sample
alone, so that steps compare.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cinemo import storage
from cinemo.cache import Damaged, FileCache
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.reader import ShardReader
from cinemo.media.motion import mean_adjacent_ssim, motion_bucket
from cinemo.media.mp4 import write_video
from cinemo.methods import Example, Method, method_class, run
from cinemo.networks.frozen import Vae
from cinemo.training.report.progress import Sheet
from cinemo.training.run.batch import FrozenStates, example_of, stored_latents, undropped
from cinemo.types import Condition, LatentSample, RunError, keyed_generator

STEPS = 20
_LABEL, _GAP, _COLUMNS = 13, 2, 8


def first_samples(
    index: DatasetIndex, count: int, held_out_shards: int = 0, fields: Sequence[str] = ()
) -> list[LatentSample]:
    """The first ``count`` samples of the held-out (last) shards, where there are any, else of the dataset.

    All are of one shard; fewer where it holds fewer. ``fields``: what they carry beside their latents.
    """
    sizes = index.samples_of_shards
    held_out = range(len(sizes) - held_out_shards, len(sizes))
    reader = ShardReader(index, fields, FileCache(1e9), keep=1)
    for position in (place for place in (*held_out, *range(len(sizes))) if sizes[place]):
        with contextlib.suppress(Damaged):  # whether that may be, others say
            shard = reader.get(position)
            return [shard.sample(place) for place in range(min(count, len(shard.members.keys)))]
    raise RunError(f"{index.uri}: every shard is damaged or missing; run precompute.py again")


def sheet_latents(
    recipe: Recipe, method: Method, frozen: FrozenStates, samples: Sequence[LatentSample], device: torch.device
) -> list[torch.Tensor]:
    """Animated latents (variants, C, F, h, w) of each sample's first frame. Under ZeRO-3 every rank calls this."""
    made, count = [], len(method.variants)
    told = undropped(recipe)
    for sample in samples:
        video_CFHW = stored_latents(sample, recipe).transpose(0, 1).to(device)
        example = example_of(told, sample, functools.partial(keyed_generator, recipe.train.seed))
        fields = {
            name: torch.stack([torch.full_like(own, asked.get(name, own.item())) for asked in method.variants.values()])
            if own.dim() == 0
            else own.expand(count, *own.shape)
            for name, own in example.fields.items()
        }
        condition = method.condition(
            video_CFHW.expand(count, -1, -1, -1, -1),
            {name: field.to(device) for name, field in fields.items()},
            _states(frozen, example, count),
        )
        channels, frames, h, w = video_CFHW.shape
        generator = keyed_generator(recipe.train.seed, "sheet", sample.key)
        noise_CFHW = torch.randn(method.target_shape((channels, frames, h, w)), generator=generator)
        sampling = method.sampling(
            condition,
            Condition(_states(frozen, method.untold, count)),
            noise_CFHW.to(device).expand(count, -1, -1, -1, -1),
            STEPS,
            recipe.sample.guidance_scale,
            keyed_generator(recipe.train.seed, "fresh noise", sample.key),
        )
        with torch.no_grad():
            video_BCFHW = run(method, sampling)
        made.append(video_BCFHW)
    return made


def _states(frozen: FrozenStates, example: Example, count: int) -> dict[str, torch.Tensor]:
    """(count, L, D) by slot: what the encoders make of one example, for every variant."""
    texts = {slot: [text] for slot, text in example.texts.items()}
    images = {slot: [picture] for slot, picture in example.images.items()}
    return {slot: states.expand(count, -1, -1) for slot, states in frozen(texts, images).items()}


def decoded(
    recipe: Recipe, vae: Vae, samples: Sequence[LatentSample], animated: Sequence[torch.Tensor]
) -> list[list[np.ndarray]]:
    """For each sample its own frames, then those of `sheet_latents`' animations: uint8 (F, H, W, 3)."""
    made = []
    for sample, video_BCFHW in zip(samples, animated, strict=True):
        truth_FCHW = stored_latents(sample, recipe).to(video_BCFHW.device)
        with torch.no_grad():
            made.append([vae.decode(frames) for frames in (truth_FCHW, *video_BCFHW.transpose(1, 2))])
    return made


def write_videos(
    directory: Path, recipe: Recipe, step: int, samples: Sequence[LatentSample], frames: Sequence[Sequence[np.ndarray]]
) -> list[str]:
    """Write each animation of `decoded` as ``image-00-bucket-03.mp4``, what it shows in its metadata; the names."""
    names = []
    variants = method_class(recipe).variants
    for number, (sample, (_, *animations)) in enumerate(zip(samples, frames, strict=True)):
        for (name, asked), frames_FHWC in zip(variants.items(), animations, strict=True):
            names.append(f"image-{number:02d}-{name}.mp4")
            settings = {"step": step, "sample": sample.key, "prompt": sample.caption, **asked}
            settings |= {"steps": STEPS, "guidance_scale": recipe.sample.guidance_scale, "recipe": recipe.name}
            metadata = {"comment": json.dumps(settings, sort_keys=True)}
            write_video(directory / names[-1], frames_FHWC, recipe.sample.fps, metadata)
    return names


def draw_sheet(recipe: Recipe, samples: Sequence[LatentSample], frames: Sequence[Sequence[np.ndarray]]) -> bytes:
    """The PNG of what `decoded` made."""
    rows: list[tuple[str, np.ndarray]] = []
    for sample, (truth, *animations) in zip(samples, frames, strict=True):
        bucket = motion_bucket(sample.ssim, recipe.data.bucket_edges)
        rows.append((f"{sample.clip_id}: {sample.caption[:60]} (true, bucket {bucket})", truth))
        labels = [name.replace("-", " ") for name in method_class(recipe).variants]
        rows += list(zip(labels, animations, strict=True))
    return contact_sheet(recipe, rows)


def contact_sheet(recipe: Recipe, rows: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """A PNG with a row of frames for each video (F, H, W, 3), below its label."""
    height, width = recipe.data.size
    columns = min(_COLUMNS, *(len(frames_FHWC) for _, frames_FHWC in rows))
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, len(rows) * (height + _LABEL + _GAP) - _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, frames_FHWC) in enumerate(rows):
        top = row * (height + _LABEL + _GAP)
        pen.text((2, top), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, frame in enumerate(np.linspace(0, len(frames_FHWC) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(frames_FHWC[frame]), (column * (width + _GAP), top + _LABEL))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def write_samples(
    output: str,
    recipe: Recipe,
    step: int,
    vae: Vae,
    samples: Sequence[LatentSample],
    animated: Sequence[torch.Tensor],
) -> Sheet:
    """Store ``samples/step-000100.png`` and the mp4s of ``samples/step-000100/`` under a run's output."""
    frames, name = decoded(recipe, vae, samples, animated), f"step-{step:06d}"
    root = storage.join(output, "samples")
    with tempfile.TemporaryDirectory(prefix="cinemo-samples-") as scratch:
        (Path(scratch) / f"{name}.png").write_bytes(draw_sheet(recipe, samples, frames))
        videos = write_videos(Path(scratch) / name, recipe, step, samples, frames)
        storage.upload(Path(scratch), root)
    uris = storage.join(root, f"{name}.png"), *(storage.join(root, name, video) for video in videos)
    return Sheet(step, uris, motion_of(recipe, frames))


def motion_of(recipe: Recipe, frames: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
    """Mean motion (1 - mean SSIM of neighbouring frames) of the samples' own frames and of each variant."""
    names = ("clips", *method_class(recipe).variants)
    moved = [[1 - mean_adjacent_ssim(video, recipe.data.ssim) for video in videos] for videos in frames]
    return dict(zip(names, np.mean(moved, axis=0).tolist(), strict=True))
