"""The model card of a bundle (README.md beside its weights), made of what was measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cinemo.bundle import BundleCard
from cinemo.evaluation.measurements import METRICS


def model_card(card: BundleCard, metrics: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> str:
    """Markdown.

    Args:
        metrics: as ``metrics.json`` has them.
        calibration: as ``calibration.json`` has it, of a method with a control of how much moves.
    """
    data, recipe = card.recipe.data, card.recipe
    height, width = data.size
    origin = ", ".join(f"{name} {_plain(value)}" for name, value in card.provenance.items() if value not in (None, {}))
    lines = [
        "---",
        "library_name: cinemo",
        "pipeline_tag: image-to-video",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"Animates a picture: {data.frames} frames of {width}x{height} pixels. Method `{recipe.method}`, bundle "
        f"`{card.digest[:12]}`{f', made from {origin}' if origin else ''}.",
        "",
        "## What was measured",
        "",
        f"On {_measured_on(metrics)}, {metrics['steps']} steps ({metrics['passes_a_video']:g} passes of the network), "
        f"seed {metrics['seed']}. Intervals are 95%. A metric without a value needs weights that were not given.",
        "",
        "| metric | value | interval | at half the videos |",
        "|---|---|---|---|",
        *(_row(metric.title, metrics["metrics"][metric.name]) for metric in METRICS),
        "",
        "Protocol: " + "; ".join(f"{name} {_plain(value)}" for name, value in metrics["protocol"].items()) + ".",
    ]
    for name, identity in metrics["extractors"].items():
        lines.append(f"Network `{name}`: {', '.join(map(str, identity.values()))}.")
    if calibration is not None:
        lines += ["", "## Motion control", "", *_motion(calibration)]
    if recipe.toy:
        lines += [
            "",
            "## Limits",
            "",
            f"A toy of {width}x{height} pixels, to show the method at work, not for quality.",
        ]
    return "\n".join(lines) + "\n"


def _measured_on(metrics: Mapping[str, Any]) -> str:
    if metrics["protocol"]["frame_stride"] is None:
        return f"{metrics['samples']} pictures of `{metrics['protocol']['data']}`"
    return f"{metrics['samples']} samples of dataset `{str(metrics['dataset'])[:12]}`"


def _motion(calibration: Mapping[str, Any]) -> list[str]:
    control, obeys = calibration["control"].replace("_", " "), calibration["obedience"] or {}
    pictures, seeds = len(calibration["motion"]), len(calibration["motion_of_seeds"][0][0])
    said = {"dead": "values that move no more than the least", "saturated": "values that move no less than the most"}
    lines = [
        f"{pictures} picture{'s' * (pictures > 1)} at {len(calibration['values'])} values of {control}, {seeds} "
        f"seed{'s' * (seeds > 1)}. `motion_strength` (0..1) is linear in the motion below"
        + ("; each picture was judged by the map of all the others:" if obeys else "."),
        "",
        *(f"- {name.replace('_', ' ')}: {_number(value)}" for name, value in obeys.items()),
        *(f"- {text}: {_plain(calibration[name])}" for name, text in said.items() if calibration[name]),
        "",
        f"| {control} | motion (1 - SSIM) | nine of ten videos | pixels a frame |",
        "|---|---|---|---|",
    ]
    rows = zip(
        calibration["values"], calibration["mean_motion"], *calibration["interval"], calibration["mean_speed"],
        strict=True,
    )  # fmt: skip
    lines += [
        f"| {value} | {mean:.4f} | {low:.4f} to {high:.4f} | {speed:.2f} |" for value, mean, low, high, speed in rows
    ]
    return lines


def _row(title: str, estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return f"| {title} | | | |"
    low, high, half = (estimate[name] for name in ("low", "high", "at_half"))
    interval = "" if low is None else f"{_number(low)} to {_number(high)}"
    return f"| {title} | {_number(estimate['value'])} | {interval} | {'' if half is None else _number(half)} |"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
