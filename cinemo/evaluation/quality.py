"""What less work costs in quality: ways to sample, each against many steps of DDIM with the same noise.

The table (``quality.json``) is kept in the bundle; requests for a ``quality`` then choose by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cinemo import storage
from cinemo.animate import AnimateRequest, blank_inputs, prepare
from cinemo.bundle import QUALITY, ModelBundle, keep_quality, load_bundle
from cinemo.diffusion.guidance import Sampling
from cinemo.evaluation.metrics.frames import motion, psnr
from cinemo.evaluation.scenes import open_scenes
from cinemo.media.synthetic import CLIP_FRAMES, render_scene
from cinemo.methods import at_motion, method_class, run
from cinemo.methods.quality import MOST_DB, NAMES, QualityTable, Sampled
from cinemo.networks.features import OUTER_SHARE
from cinemo.types import InputError

REFERENCE_STEPS = 50
SEED = 7004  # of scenes that no training has seen
LEVELS = (7, 14, 3)  # of motion, in turns: a picture each
Picture = tuple[np.ndarray, str]


def candidates(bundle: ModelBundle) -> Iterator[dict[str, Any]]:
    """Ways to sample, the reference first."""
    sample = bundle.recipe.sample
    low, high = sample.guidance_interval
    usual: dict[str, Any] = {"solver": "ddim", "guidance_interval": (low, high), "reuse_features": 1}
    yield usual | {"steps": max(REFERENCE_STEPS, sample.steps)}
    for steps in (6, 7, 8, 9, 10, 12, 15, 20, 25):
        yield usual | {"steps": steps}
    narrow = (round(low + 0.2 * (high - low), 3), high)
    for steps in (10, 14):
        yield usual | {"steps": steps, "guidance_interval": narrow}
    for steps in (16, 24):
        yield usual | {"steps": steps, "reuse_features": 2}
    if bundle.method.schedule.clean_scale is None and sample.eta == 0:
        for steps in (14, 20):
            yield usual | {"steps": steps, "solver": "multistep"}


@torch.inference_mode()
def measure_quality(
    bundle: ModelBundle,
    pictures: list[Picture],
    seed: int = 0,
    ways: Sequence[dict[str, Any]] | None = None,
    say: Callable[[str], None] = print,
) -> QualityTable:
    """Sample every picture in every way.

    Args:
        pictures: (H, W, 3) uint8 and a prompt each.
        ways: the reference first; None: the bundle's `candidates`.

    Raises:
        InputError: the bundle's method has one way alone.
    """
    if "quality" not in method_class(bundle.recipe).controls_type.model_fields:
        raise InputError(f"--quality: method {bundle.method.name} has no ways to sample with less work")
    recipe, others = bundle.recipe, blank_inputs(bundle.recipe)
    reference: list[np.ndarray] = []
    rows: list[Sampled] = []
    ways = list(candidates(bundle)) if ways is None else ways
    for number, way in enumerate(ways, 1):
        videos = [
            made(bundle, AnimateRequest(picture, prompt, inputs=others, seed=seed, **at_motion(recipe, level), **way))
            for (picture, prompt), level in zip(pictures, _turns(len(pictures)), strict=True)
        ]
        frames = [each for each, _ in videos]
        reference = reference or frames
        distances = [psnr(a[1:], b[1:]) for a, b in zip(reference, frames, strict=True)]
        changes = [abs(motion(b) - motion(a)) for a, b in zip(reference, frames, strict=True)]
        passes = float(np.mean([work.passes for _, work in videos]))
        row = Sampled(**way, passes=passes, psnr=_mean(distances), psnr_low=min(distances), motion=max(changes))
        rows.append(row)
        say(f"quality {number}/{len(ways)}: {said(row)}")
    return QualityTable.of(bundle.digest, len(pictures), rows)


def said(row: Sampled) -> str:
    """A row of the table for people."""
    parts = [f"{row.steps} steps of {row.solver}", "guidance in {:g}-{:g}".format(*row.guidance_interval)]
    parts += [f"features reused at every {row.reuse_features} steps"] if row.reuse_features > 1 else []
    result = "the reference" if row.psnr >= MOST_DB else f"{row.psnr:.1f} dB (least {row.psnr_low:.1f})"
    return f"{', '.join(parts)}: {row.passes:.1f} passes, {result}, motion within {row.motion:.4f}"


def write_quality(
    location: str,
    output: str,
    count: int,
    data: str | None = None,
    seed: int = 0,
    device: str | None = None,
    into_bundle: bool = False,
    say: Callable[[str], None] = print,
) -> QualityTable:
    """Write ``quality.json`` under ``output``, and into the bundle where asked.

    Args:
        count: pictures; of ``data``, a dataset or folder of pictures, else rendered ones.

    Raises:
        InputError: no bundle or pictures there, or the bundle cannot be written.
    """
    if count < 1:
        raise InputError(f"--quality is {count}, expected at least 1 picture")
    storage.check_writable(output)
    bundle = load_bundle(location, device)
    table = measure_quality(bundle, _pictures(bundle, count, data), seed, say=say)
    storage.write_json(storage.join(output, QUALITY), table.to_json())
    for name in NAMES:
        say(f"{name}: {said(table.choose(name))}")
    if into_bundle:
        keep_quality(location, table)
    return table


def _pictures(bundle: ModelBundle, count: int, data: str | None) -> list[Picture]:
    if data is not None:
        scenes = open_scenes(data, count)
        scenes.check(bundle)
        return [(scene.frames(bundle)[0], scene.prompt) for scene in (scenes[place] for place in range(len(scenes)))]
    kinds = ("object", "pan", "flow")
    rendered = [render_scene(SEED, place, kind=kinds[place % len(kinds)]) for place in range(count)]
    return [(scene.draw(CLIP_FRAMES / 4), scene.without_speed()) for scene in rendered]


def _turns(count: int) -> list[int]:
    return [LEVELS[place % len(LEVELS)] for place in range(count)]


@dataclass
class Work:
    """What sampling took: ``calls`` of the network, and its ``passes``, one for each video in a call; guidance asks for
    two. A pass that reuses features counts by its share."""

    calls: int = 0
    passes: float = 0.0


@torch.inference_mode()
def made(bundle: ModelBundle, request: AnimateRequest) -> tuple[np.ndarray, Work]:
    """A request's video, (F, H, W, 3) uint8, and what it took."""
    work = Work()
    latents_BCFHW = run(bundle.method, _counted(prepare(bundle, request).sampling, work))
    return bundle.decoder.decode(latents_BCFHW[0].float().transpose(0, 1)), work


def _counted(sampling: Sampling, work: Work) -> Sampling:
    query = next(sampling)
    while True:
        work.calls += 1
        work.passes += len(query.x) * (OUTER_SHARE if query.features == "again" else 1)
        try:
            query = sampling.send((yield query))
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
