"""Measure bundles on clips of a dataset or pictures of a folder: metrics, and whether motion obeys its control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cinemo import storage, tracking
from cinemo.bundle import CALIBRATION, check_beside, keep_beside, keep_calibration, load_bundle, read_card
from cinemo.evaluation.calibration import Drift, drift
from cinemo.evaluation.card import model_card
from cinemo.evaluation.extractors import EXTRACTORS
from cinemo.evaluation.measurements import METRICS, Result
from cinemo.evaluation.measuring import Measurer, Plan, Say
from cinemo.evaluation.rendered import BARS, STEPS, measure_motion, misses
from cinemo.evaluation.report import write_evaluation_report
from cinemo.evaluation.scenes import Scenes, open_scenes
from cinemo.media.synthetic import CLIP_FRAMES
from cinemo.progress import doing, say
from cinemo.types import InputError, refuse

CARD = "README.md"
_MORE_VIDEOS = (
    "needs at least 6 videos (--limit) for an interval and for the value at N/2, without which it says nothing"
)


def evaluate(
    bundle_location: str,
    data: str,
    output: str,
    plan: Plan | None = None,
    device: str | None = None,
    into_bundle: bool = False,
    against: Sequence[str] = (),
    track: bool = False,
    workers: int = 0,
    say: Say = say,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``report.html``, a model card and, where the method has a control of how much moves,
    ``calibration.json`` under ``output``; returns the metrics.

    Args:
        into_bundle: also keep calibration and card in the bundle, the first for the server and its page.
        against: other bundles, measured on the same samples and shown beside it.
        track: also to MLflow.
        workers: of a Ray cluster that share the work; 0: this process. They must all see ``output``.

    Raises:
        InputError: no bundle, dataset or picture there, or they do not fit together.
    """
    plan = plan or Plan()
    if workers < 0:
        raise InputError(f"--workers is {workers}, expected 0 (this process) or more")
    storage.check_writable(output)
    scenes = open_scenes(data, plan.limit)
    for location in (bundle_location, *against):  # before hours are spent on the others
        read_card(location)
    if into_bundle:
        check_beside(bundle_location)
    faults = scenes.faults()
    told = (
        f"--data {data}: {len(faults)} of {len(scenes)} pictures cannot be animated, as said above; mend or remove them"
    )
    refuse(faults, told, say)
    results = []
    for location in (bundle_location, *against):
        measurer = Measurer(location, scenes, output, plan, device)
        if workers:
            from cinemo.evaluation.cluster import measure_on_ray  # Ray is for those who ask for it

            measure_on_ray(measurer, output, workers, device, say)
        results.append(measurer.result(say))
    result, others = results[0], results[1:]
    drifts = [_drift(result, other) for other in others]
    metrics: dict[str, Any] = result.to_json() | {
        "dataset": scenes.fingerprint,
        "samples": len(result.rows),
        "seed": plan.seed,
        "protocol": _protocol(plan, scenes, result),
        "per_sample": list(result.rows),
        "against": [
            other.to_json() | {"drift": each and vars(each) | {"has_collapsed": each.has_collapsed}}
            for other, each in zip(others, drifts, strict=True)
        ],
    }
    storage.write_json(storage.join(output, "metrics.json"), metrics)
    measured = None
    if result.calibration is not None:
        measured = {"bundle": result.digest, "steps": result.steps} | result.calibration.to_json()
        storage.write_json(storage.join(output, CALIBRATION), measured)
        if into_bundle:
            keep_calibration(bundle_location, measured)
    elif storage.exists(stale := storage.join(output, CALIBRATION)):  # of another bundle or plan
        storage.remove(stale)
    card = model_card(read_card(bundle_location), metrics, measured)
    storage.write_bytes(storage.join(output, CARD), card.encode())
    if into_bundle:
        keep_beside(bundle_location, CARD, card.encode())
    with doing("drawing the report"):
        write_evaluation_report(
            storage.join(output, "report.html"),
            results,
            drifts,
            metrics["protocol"],
            needed(result),
            scenes.dataset,
        )
    if track:
        _track(output, result, metrics, scenes, say)
    for other, each in zip(others, drifts, strict=True):
        if each is not None and each.has_collapsed:
            say(f"warning: {each.verdict(other.location)}")
    return metrics


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """What `evaluate` found, for a person."""
    known = ((metric, metrics["metrics"][metric.name]) for metric in METRICS)
    lines = [f"{metric.title}: {_estimate(estimate)}" for metric, estimate in known if estimate is not None]
    if metrics["motion_spearman"] is not None:
        lines.append(f"motion control, rank correlation of value and motion: {metrics['motion_spearman']:.3f}")
    return lines


def _estimate(stored: Mapping[str, Any]) -> str:
    """``0.51 [0.42, 0.6], 1.1 with half of 64 videos``."""
    text = f"{stored['value']:.4g}"
    if stored["low"] is not None:
        text += f" [{stored['low']:.4g}, {stored['high']:.4g}]"
    return (
        text if stored["at_half"] is None else f"{text}, {stored['at_half']:.4g} with half of {stored['videos']} videos"
    )


def needed(result: Result) -> dict[str, str]:
    """By metric that stays empty, what it needs."""
    known = [metric for metric in METRICS if metric.needs in EXTRACTORS and metric.name not in result.estimates]
    return {
        metric.name: _MORE_VIDEOS
        if metric.needs in result.extractors
        else f"needs --extractor {metric.needs}=PLACE: {EXTRACTORS[str(metric.needs)].expects}"
        for metric in known
    }


def _protocol(plan: Plan, scenes: Scenes, result: Result) -> dict[str, Any]:
    """What figures stand for: the measurement's own facts, and where they depart from a paper's protocol."""
    strides = [row["frame_interval"] for row in result.rows if "frame_interval" in row]
    facts: dict[str, Any] = {
        "data": scenes.uri.rstrip("/").rpartition("/")[2],
        "videos": len(result.rows),
        "frames": result.frames,
        "frame_stride": [min(strides), max(strides)] if strides else None,
        "height_and_width": list(result.size),
        "real_videos": "none, pictures alone" if scenes.dataset is None else "decoded from the dataset's latents",
        "first_frame_counts": plan.first_frame,
        "compared_with_the_clip": "frames after the given one",  # PSNR, SSIM, LPIPS
    }
    if plan.protocol is None:
        return facts
    stride = (min(strides), max(strides)) if strides else None
    departures = plan.protocol.departures(
        facts["data"], facts["videos"], result.frames, stride, result.size, plan.first_frame
    )
    departures.append("there are no real videos" if scenes.dataset is None else "real videos are decoded from latents")
    named = {
        "name": plan.protocol.name,
        "source": plan.protocol.source,
        "unsaid": plan.protocol.unsaid,
        "prompts": plan.protocol.prompts,
        "reported_there": list(plan.protocol.metrics),
    }
    return facts | named | {"departures": departures}


def _drift(result: Result, other: Result) -> Drift | None:
    if result.calibration is None or other.calibration is None:
        return None
    same = (result.calibration.control, result.calibration.values)
    if same != (other.calibration.control, other.calibration.values):
        return None
    return drift(result.calibration, other.calibration)


def _track(output: str, result: Result, metrics: Mapping[str, Any], scenes: Scenes, say: Say) -> None:
    params = {"output": output, "bundle": result.digest, "recipe": result.name, "steps": str(result.steps)}
    run = tracking.Run(output, tracking.run_name("evaluate", result.name, scenes.uri, output), params=params)
    run.dataset(scenes.uri, scenes.fingerprint[:36], {"samples": metrics["samples"]}, context="evaluation")
    run.log(0, {name: estimate.value for name, estimate in result.estimates.items()})
    halves = {f"{name}_at_half": each.at_half for name, each in result.estimates.items()}
    run.log(0, {name: value for name, value in halves.items() if value is not None})
    run.log(0, {f"obedience_{name}": value for name, value in (metrics["obedience"] or {}).items()})
    work = {"calls_a_video": result.calls, "passes_a_video": result.passes, "seconds_a_video": result.seconds}
    spearman = result.calibration.spearman if result.calibration else None
    run.log(0, work if spearman is None else work | {"motion_spearman": spearman})
    for name in ("metrics.json", "report.html", CARD, *([CALIBRATION] if result.calibration else [])):
        run.text(name, storage.read_bytes(storage.join(output, name)).decode())
    run.finish()
    say(run.hint)


def evaluate_rendered(
    bundle_location: str,
    output: str,
    count: int,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    say: Callable[[str], None] = say,
    as_files: bool = False,
) -> dict[str, Any]:
    """Write ``motion.json`` under ``output``: `cinemo.evaluation.rendered` for one bundle; returns its figures.

    Args:
        count: rendered scenes of each kind.
        as_files: ask for the motion that a scene has as an mp4 file; for a bundle that was trained on files.

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
    figures = measure_motion(bundle, count, steps or STEPS, seed, say, as_files)
    missed = misses(figures)
    for name, (sign, bar) in ((name, bar) for name, bar in BARS.items() if name in figures):
        shown = f"missed by {missed[name]:.3f}" if name in missed else "met"
        say(f"{name}: {figures[name]:.3f} ({sign} {bar:g}: {shown})")
    place = storage.join(output, "motion.json")
    storage.write_json(place, {"bundle": bundle.digest, "as_files": as_files} | figures)
    say(f"{len(BARS.keys() & figures.keys()) - len(missed)} met, {len(missed)} missed; every figure: {place}")
    return figures
