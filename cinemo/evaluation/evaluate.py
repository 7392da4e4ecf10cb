"""Measure a bundle on samples of a dataset: metrics against the true clips, and the motion-control report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import CALIBRATION, ModelBundle, keep_calibration, load_bundle
from cinemo.data.dataset.shards import DatasetIndex, Members, read_sample, record_uri, tar_uri
from cinemo.evaluation.calibration import calibrate
from cinemo.evaluation.figures import contact_sheet
from cinemo.evaluation.metrics.frames import first_frame_consistency, motion, psnr
from cinemo.evaluation.rendered import BARS, STEPS, measure_motion, misses
from cinemo.evaluation.report import write_evaluation_report
from cinemo.media.synthetic import CLIP_FRAMES
from cinemo.methods import at_motion, method_class
from cinemo.types import InputError, LatentSample

_SHOWN = 8


def evaluate(
    bundle_location: str,
    data: str,
    output: str,
    limit: int = 4,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    into_bundle: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``report.html`` and, where the method has a control of how much moves,
    ``calibration.json`` under ``output``; returns the metrics.

    Args:
        limit: samples, spread evenly over the dataset; each costs six videos: one to compare, five for motion control.
        steps: DDIM steps; the bundle's default where None.
        into_bundle: also keep the calibration in the bundle, for the server's page.

    Raises:
        InputError: no bundle or dataset there, or they do not fit together.
    """
    if limit < 1:
        raise InputError(f"--limit is {limit}, expected at least 1")
    storage.check_writable(output)
    index = DatasetIndex.load(data)
    bundle = load_bundle(bundle_location, device)
    samples, method = spread_samples(index, limit), method_class(bundle.recipe)
    _check_fit(bundle, samples[0], data)
    rows, videos, labels, images = [], [], [], []
    for number, sample in enumerate(samples):
        latents_FCHW = torch.from_numpy(np.array(sample.latents_FCHW, np.float32))
        truth_FHWC = bundle.decoder.decode(latents_FCHW)
        controls = method.controls_like(bundle.recipe, sample)
        request = AnimateRequest(truth_FHWC[0], sample.caption, steps=steps, seed=seed, **controls)
        made_FHWC = animate(bundle, request).frames_FHWC
        rows.append({"clip": sample.clip_id} | controls | compare(truth_FHWC, made_FHWC))
        images.append((truth_FHWC[0], sample.caption))
        videos += [truth_FHWC, made_FHWC]
        labels += [f"{sample.clip_id} (clip)", f"generated{_said(controls)}: {sample.caption}"]
        say(f"sample {number + 1}/{len(samples)}: {sample.clip_id}")
    calibration = None
    if at_motion(bundle.recipe, 0):
        calibration = calibrate(
            bundle, images, steps=steps, seed=seed, progress=lambda done, total: say(f"motion control {done}/{total}")
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in METRICS}
    metrics = {
        "bundle": bundle.digest,
        "dataset": index.info["fingerprint"],
        "recipe": bundle.recipe.name,
        "samples": len(rows),
        "steps": steps or bundle.recipe.sample.steps,
        "seed": seed,
        "motion_spearman": calibration.spearman if calibration else None,
        "mean": means,
        "per_sample": rows,
    }
    storage.write_json(storage.join(output, "metrics.json"), metrics)
    if calibration is not None:
        measured = {"bundle": bundle.digest} | calibration.to_json()
        storage.write_json(storage.join(output, CALIBRATION), measured)
        if into_bundle:
            keep_calibration(bundle_location, measured)
    sheet = contact_sheet(videos[: 2 * _SHOWN], labels[: 2 * _SHOWN])
    title = f"Evaluation of {bundle.recipe.name}"
    write_evaluation_report(storage.join(output, "report.html"), title, means, rows, calibration, index, sheet)
    return metrics


def evaluate_rendered(
    bundle_location: str,
    output: str,
    count: int,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write ``motion.json`` under ``output``: `cinemo.evaluation.rendered` for one bundle; returns its figures.

    Args:
        count: rendered scenes of each kind.

    Raises:
        InputError: no bundle there, or its recipe asks for more frames than a rendered scene has.
    """
    if count < 2:
        raise InputError(f"--rendered is {count}, expected at least 2")
    storage.check_writable(output)
    bundle = load_bundle(bundle_location, device)
    data = bundle.recipe.data
    if data.frame_interval[0] * (data.frames - 1) >= CLIP_FRAMES:
        raise InputError(
            f"--rendered: recipe {bundle.recipe.name} needs {data.frame_interval[0] * (data.frames - 1) + 1} frames "
            f"of a scene (interval {data.frame_interval[0]}), rendered ones have {CLIP_FRAMES}"
        )
    figures = measure_motion(bundle, count, steps or STEPS, seed, say)
    missed = misses(figures)
    for name, (sign, bar) in ((name, bar) for name, bar in BARS.items() if name in figures):
        shown = f"missed by {missed[name]:.3f}" if name in missed else "met"
        say(f"{name}: {figures[name]:.3f} ({sign} {bar:g}: {shown})")
    storage.write_json(storage.join(output, "motion.json"), {"bundle": bundle.digest} | figures)
    return figures


def compare(truth_FHWC: np.ndarray, made_FHWC: np.ndarray) -> dict[str, float]:
    """The metrics of a generated video against the clip it began with; frame 1 is given, so it counts apart."""
    return {
        "psnr_to_clip": float(np.mean([psnr(a, b) for a, b in zip(truth_FHWC[1:], made_FHWC[1:], strict=True)])),
        "psnr_of_first_frame": psnr(truth_FHWC[0], made_FHWC[0]),
        "first_frame_consistency": first_frame_consistency(made_FHWC),
        "first_frame_consistency_of_clip": first_frame_consistency(truth_FHWC),
        "motion": motion(made_FHWC),
        "motion_of_clip": motion(truth_FHWC),
    }


METRICS = (
    *("psnr_to_clip", "psnr_of_first_frame", "first_frame_consistency", "first_frame_consistency_of_clip"),
    *("motion", "motion_of_clip"),
)


def _said(controls: dict[str, Any]) -> str:
    """``, motion bucket 3`` of controls, for people."""
    return "".join(f", {name.replace('_', ' ')} {value}" for name, value in controls.items())


def spread_samples(index: DatasetIndex, count: int) -> list[LatentSample]:
    """Up to ``count`` samples at equal distances over a dataset; reads a record and one range for each."""
    ends = np.cumsum(index.samples_of_shards)
    chosen = np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).round().astype(int)
    samples = []
    for position in chosen:
        place = int(np.searchsorted(ends, position, side="right"))
        shard = index.shards[place]
        members = Members(**storage.read_json(record_uri(index.uri, shard))["members"])
        number = int(position - (ends[place - 1] if place else 0))
        begin = members.json_offset[number]
        size = members.array_offset[number] - begin + 2 * int(np.prod(members.array_shape))
        one = Members(
            [members.keys[number]],
            [0],
            [members.json_size[number]],
            [members.array_offset[number] - begin],
            members.array_shape,
        )
        chunk = storage.read_bytes(tar_uri(index.uri, shard), begin, size)
        samples.append(read_sample(memoryview(chunk), one, 0))
    return samples


def _check_fit(bundle: ModelBundle, sample: LatentSample, data: str) -> None:
    height, width = (side // bundle.vae.downscale for side in bundle.recipe.data.size)
    expected = (bundle.recipe.data.frames, bundle.vae.latent_channels, height, width)
    if sample.latents_FCHW.shape != expected:
        raise InputError(
            f"--data {data}: its latents are {sample.latents_FCHW.shape}, bundle {bundle.recipe.name} makes {expected} "
            "(frames, channels, rows, columns); give a dataset made with that recipe"
        )
