"""Measure bundles on samples of a dataset: metrics against the real clips, and whether motion obeys its control.

What was measured of a video or a picture is kept under ``parts/``, by all that decides it: a run that was stopped goes
on where it was, and a longer one adds to a shorter one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cinemo import storage, tracking
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import CALIBRATION, ModelBundle, keep_calibration, load_bundle, read_card
from cinemo.data.dataset.shards import DatasetIndex, Members, read_sample, record_uri, tar_uri
from cinemo.evaluation.calibration import Calibration, Drift, drift, levels
from cinemo.evaluation.card import model_card
from cinemo.evaluation.extractors import EXTRACTORS, Extractor, LatentStatistics
from cinemo.evaluation.measurements import METRICS, Measurements, Pair, Result, Seen, Shown
from cinemo.evaluation.metrics.frames import flow_speed, motion
from cinemo.evaluation.noise import compare_noise
from cinemo.evaluation.protocols import Protocol
from cinemo.evaluation.rendered import BARS, STEPS, measure_motion, misses
from cinemo.evaluation.report import write_evaluation_report
from cinemo.media.synthetic import CLIP_FRAMES
from cinemo.methods import method_class
from cinemo.types import InputError, LatentSample

CARD = "README.md"
SHOWN = 8  # videos on the page
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How bundles are measured.

    Attributes:
        limit: samples to measure, spread evenly over the dataset.
        pictures: of them, those that the control of motion is measured with.
        values: of that control, at most, from the least motion to the most.
        seeds: videos of each picture and value.
        steps: sampling steps; None: what a bundle's recipe says.
        seed: of the videos; of several seeds the first.
        noise: also compare the method's ways to draw the initial noise, on the same pictures.
        first_frame: whether the given frame counts in what networks see of a video.
        extractors: networks that metrics need, by name.
        protocol: of a paper, to say where this departs from it.
    """

    limit: int = 4
    pictures: int = 4
    values: int = 5
    seeds: int = 1
    steps: int | None = None
    seed: int = 0
    noise: bool = False
    first_frame: bool = True
    extractors: Mapping[str, Extractor] = field(default_factory=dict)
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("pictures", 0), ("values", 2), ("seeds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least {least}")


def evaluate(
    bundle_location: str,
    data: str,
    output: str,
    plan: Plan | None = None,
    device: str | None = None,
    into_bundle: bool = False,
    against: Sequence[str] = (),
    track: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``report.html``, a model card and, where the method has a control of how much moves,
    ``calibration.json`` under ``output``; returns the metrics.

    Args:
        into_bundle: also keep calibration and card in the bundle, the first for the server and its page.
        against: other bundles, measured on the same samples and shown beside it.
        track: also to MLflow.

    Raises:
        InputError: no bundle or dataset there, or they do not fit together.
    """
    plan = plan or Plan()
    storage.check_writable(output)
    index = DatasetIndex.load(data)
    samples = spread_samples(index, plan.limit)
    results = [_result(each, index, samples, output, plan, device, say) for each in (bundle_location, *against)]
    result, others = results[0], results[1:]
    drifts = [_drift(result, other) for other in others]
    metrics: dict[str, Any] = result.to_json() | {
        "dataset": index.info["fingerprint"],
        "samples": len(samples),
        "seed": plan.seed,
        "protocol": _protocol(plan, index, samples),
        "per_sample": list(result.rows),
        "against": [
            other.to_json() | {"drift": each and vars(each) | {"has_collapsed": each.has_collapsed}}
            for other, each in zip(others, drifts, strict=True)
        ],
    }
    storage.write_json(storage.join(output, "metrics.json"), metrics)
    measured = None
    if result.calibration is not None:
        measured = {"bundle": result.digest} | result.calibration.to_json()
        storage.write_json(storage.join(output, CALIBRATION), measured)
        if into_bundle:
            keep_calibration(bundle_location, measured)
    card = model_card(read_card(bundle_location), metrics, measured)
    storage.write_bytes(storage.join(output, CARD), card.encode())
    if into_bundle:
        storage.write_bytes(storage.join(bundle_location, CARD), card.encode())
    write_evaluation_report(
        storage.join(output, "report.html"), results, drifts, metrics["protocol"], needed(plan.extractors), index
    )
    if track:
        _track(output, result, metrics, index, say)
    for other, each in zip(others, drifts, strict=True):
        if each is not None and each.has_collapsed:
            say(
                f"warning: motion has died: {each.motion_ratio:.0%} of the motion of {other.location} and "
                f"{each.span_ratio:.0%} of the reach of its control are left"
            )
    return metrics


def needed(extractors: Mapping[str, Extractor]) -> dict[str, str]:
    """By metric that stays empty, what to put where."""
    missing = [metric for metric in METRICS if metric.needs in EXTRACTORS and metric.needs not in extractors]
    return {
        metric.name: f"needs --extractor {metric.needs}=PLACE: {EXTRACTORS[str(metric.needs)].expects}"
        for metric in missing
    }


def _result(
    location: str,
    index: DatasetIndex,
    samples: Sequence[LatentSample],
    output: str,
    plan: Plan,
    device: str | None,
    say: Say,
) -> Result:
    bundle = load_bundle(location, device)
    _check_fit(bundle, samples[0], index.uri)
    extractors = {**plan.extractors, "latents": LatentStatistics(bundle.vae, bundle.digest)}
    identities = {name: extractor.identity for name, extractor in extractors.items()}
    asked = [bundle.digest, plan.steps, plan.seed, plan.first_frame, sorted(map(str, identities.items()))]
    place = storage.join(output, "parts", _digest(asked))
    measurements, rows, shown = Measurements(), [], []
    for number, sample in enumerate(samples):
        show = number < SHOWN
        seen, pair = _seen(bundle, sample, storage.join(place, sample.key), plan, extractors, show)
        measurements.add(sample.key, seen)
        controls = bundle.method.controls_like(bundle.recipe, sample)
        rows.append({"clip": sample.clip_id} | controls | dict(seen.figures))
        if pair is not None:
            shown.append(Shown(sample.clip_id, sample.caption, _said(controls), pair.real_FHWC, pair.made_FHWC))
        say(f"{bundle.recipe.name}: sample {number + 1}/{len(samples)}: {sample.clip_id}")
    pictures = [
        (sample.key, bundle.decoder.decode(_latents(sample))[0], sample.caption) for sample in samples[: plan.pictures]
    ]
    return Result(
        location,
        bundle.recipe.name,
        bundle.digest,
        plan.steps or bundle.recipe.sample.steps,
        measurements.estimates(),
        rows,
        shown,
        calibrate(bundle, pictures, output, plan, say),
        identities,
        compare_noise(bundle, pictures, plan.steps, plan.seed) if plan.noise else {},
    )


def calibrate(
    bundle: ModelBundle, pictures: Sequence[tuple[str, np.ndarray, str]], output: str, plan: Plan, say: Say
) -> Calibration | None:
    """Animate each picture (name, (H, W, 3) uint8, prompt) at each value of the control of motion; None where the
    method has none, or there are no pictures. What was measured of a picture is kept under ``output``."""
    control = method_class(bundle.recipe).controls_type.motion_values(bundle.recipe)
    if control is None or not pictures:
        return None
    name, values = control[0], levels(control[1], plan.values)
    seeds = range(plan.seed, plan.seed + plan.seeds)
    tables = []
    for number, (key, picture_HWC, prompt) in enumerate(pictures):
        sha = hashlib.sha256(picture_HWC.tobytes()).hexdigest()
        asked = _digest([bundle.digest, plan.steps, list(seeds), name, values, sha, prompt])
        uri = storage.join(output, "parts", "motion", f"{key}-{asked}.json")
        if not storage.exists(uri):
            made = [
                [
                    _moved(bundle, picture_HWC, prompt, {name: value, "steps": plan.steps, "seed": seed})
                    for seed in seeds
                ]
                for value in values
            ]
            storage.write_json(uri, made)
        tables.append(storage.read_json(uri))
        say(f"{bundle.recipe.name}: motion control {number + 1}/{len(pictures)}: {key}")
    measured_PLS2 = np.array(tables, np.float64)
    return Calibration(name, values, measured_PLS2[..., 0], measured_PLS2[..., 1])


def _moved(
    bundle: ModelBundle, picture_HWC: np.ndarray, prompt: str, controls: Mapping[str, Any]
) -> tuple[float, float]:
    """1 - SSIM and pixels a frame of what is generated."""
    frames_FHWC = animate(bundle, AnimateRequest(picture_HWC, prompt, **controls)).frames_FHWC
    return motion(frames_FHWC), flow_speed(frames_FHWC)


def _seen(
    bundle: ModelBundle,
    sample: LatentSample,
    uri: str,
    plan: Plan,
    extractors: Mapping[str, Extractor],
    show: bool,
) -> tuple[Seen, Pair | None]:
    """What is counted of one sample, and its videos if they are shown; from an earlier run where it is there."""
    kept, frames = f"{uri}.npz", f"{uri}.frames.npz"
    if storage.exists(kept) and (not show or storage.exists(frames)):
        seen = Seen.from_bytes(storage.read_bytes(kept))
        if not show:
            return seen, None
        with np.load(io.BytesIO(storage.read_bytes(frames))) as file:
            return seen, Pair(sample.key, file["real"], file["made"], sample.caption)
    real_FHWC = bundle.decoder.decode(_latents(sample))
    controls = bundle.method.controls_like(bundle.recipe, sample)
    request = AnimateRequest(real_FHWC[0], sample.caption, steps=plan.steps, seed=plan.seed, **controls)
    pair = Pair(sample.key, real_FHWC, animate(bundle, request).frames_FHWC, sample.caption)
    seen = Seen.of(pair, extractors, plan.first_frame)
    if show:
        content = io.BytesIO()
        np.savez_compressed(content, real=pair.real_FHWC, made=pair.made_FHWC)
        storage.write_bytes(frames, content.getvalue())
    storage.write_bytes(kept, seen.to_bytes())
    return seen, pair if show else None


def _protocol(plan: Plan, index: DatasetIndex, samples: Sequence[LatentSample]) -> dict[str, Any]:
    """What figures stand for: the measurement's own facts, and where they depart from a paper's protocol."""
    intervals = [sample.frame_interval for sample in samples]
    facts: dict[str, Any] = {
        "data": index.uri.rstrip("/").rpartition("/")[2],
        "videos": len(samples),
        "frames": int(index.info["frames"]),
        "frame_stride": [min(intervals), max(intervals)],
        "size": list(index.info["size"]),
        "real_videos": "decoded from the dataset's latents",
        "first_frame": plan.first_frame,
    }
    if plan.protocol is None:
        return facts
    departures = plan.protocol.departures(
        facts["data"], facts["videos"], facts["frames"], (min(intervals), max(intervals)), tuple(facts["size"])
    )
    departures.append("real videos are decoded from latents")
    named = {"name": plan.protocol.name, "source": plan.protocol.source, "unsaid": plan.protocol.unsaid}
    return facts | named | {"departures": departures}


def _drift(result: Result, other: Result) -> Drift | None:
    if result.calibration is None or other.calibration is None:
        return None
    same = (result.calibration.control, result.calibration.values)
    if same != (other.calibration.control, other.calibration.values):
        return None
    return drift(result.calibration, other.calibration)


def _track(output: str, result: Result, metrics: Mapping[str, Any], index: DatasetIndex, say: Say) -> None:
    params = {"output": output, "bundle": result.digest, "recipe": result.name, "steps": str(result.steps)}
    run = tracking.Run(output, "evaluate", params=params)
    run.dataset(index.uri, index.info["fingerprint"][:36], {"samples": metrics["samples"]}, context="evaluation")
    run.log(0, {name: estimate.value for name, estimate in result.estimates.items()})
    run.log(0, {f"obedience_{name}": value for name, value in (metrics["obedience"] or {}).items()})
    for name in ("metrics.json", "report.html", CARD, *([CALIBRATION] if result.calibration else [])):
        run.text(name, storage.read_bytes(storage.join(output, name)).decode())
    run.finish()
    say(run.hint)


def _latents(sample: LatentSample) -> torch.Tensor:
    return torch.from_numpy(np.array(sample.latents_FCHW, np.float32))


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


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
