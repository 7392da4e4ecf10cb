"""The figures of a plan and of a run in words, for the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cinemo import storage
from cinemo.data.precompute.estimate import compare

_SHOWN = {
    "clips_per_second_per_core": ("decode and score, clips/s per core", 1.0),
    "encode_clips_per_second_per_core": ("encode, clips/s per core", 1.0),
    "clips_per_second_per_accelerator": ("encode, clips/s per accelerator", 1.0),
    "cores_per_accelerator": ("cores that keep one accelerator busy", 1.0),
    "encode_seconds_per_clip": ("encode, seconds per clip", 1.0),
    "clips_per_second_here": ("clips/s on this machine", 1.0),
    "hours_here": ("hours on this machine", 1.0),
    "core_hours": ("core hours", 1.0),
    "accelerator_hours": ("accelerator hours", 1.0),
    "samples": ("samples", 1.0),
    "quarantine_share": ("refused clips, %", 0.01),
    "bytes": ("size, MB", 1e6),
    "get_requests": ("S3 GET and HEAD requests", 1.0),
    "put_requests": ("S3 PUT requests", 1.0),
    "memory_per_node_bytes": ("memory of this node, GB", 1e9),
    "decode_clips_per_second_there": ("decode and score, clips/s on the planned nodes", 1.0),
    "encode_clips_per_second_there": ("encode, clips/s on the planned nodes", 1.0),
    "clips_per_second_there": ("clips/s on the planned nodes", 1.0),
    "days_there": ("days on the planned nodes", 1.0),
}
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))


def plan_lines(plan: Mapping[str, Any], output: str) -> list[str]:
    """What ``--plan`` prints."""
    spent = ", ".join(f"{name} {value:.3f}" for name, value in plan["seconds_per_clip"].items() if value is not None)
    lines = [
        f"{plan['clips']} clips -> {plan['shards']} shards; measured on {plan['measured_clips']} clips (seconds per "
        f"clip: {spent}; encode speed {plan['encode_speed']})",
        *_summary(plan),
    ]
    if "shapes" in plan:
        lines.append("shapes among them: " + shape_counts(plan["shapes"], "clips"))
    if plan["refused_in_sample"]:
        lines.append("refused among them: " + _counts(plan["refused_in_sample"]))
    lines += _ranges({_SHOWN[name]: value for name, value in plan["figures"].items()})
    if "costs" in plan:
        lines += _ranges(
            {(f"{item.replace('_', ' ')}, {plan['currency']}", 1.0): v for item, v in plan["costs"].items()}
        )
    return [*lines, f"ranges: {plan['ranges']}", f"written to {storage.join(output, 'plan.json')}"]


def _summary(plan: Mapping[str, Any]) -> list[str]:
    """What to ask for and what it comes to, where machines were named; the bottleneck; and what was assumed."""
    figures, lines = plan["figures"], []
    if plan["machines"]:
        days, size = figures["days_there"], figures.get("bytes")
        parts = [_range_text(days, *((1.0, "days") if days["value"] >= 2 else (1 / 24, "hours")))]
        if "costs" in plan:
            parts.append(_range_text(plan["costs"]["total"], 1.0, plan["currency"]))
        if size:
            parts.append(_range_text(size, *_size_unit(size["value"])))
        parts.append(
            f"{figures['get_requests']['value']:,.0f} GET and {figures['put_requests']['value']:,.0f} PUT requests"
        )
        lines.append(f"on {plan['machines']}: {'; '.join(parts)}")
        lines.append(f"bottleneck there: {plan['bottleneck']}{_balance(figures)}; cores taken to be as fast as here")
    else:
        lines.append(f"bottleneck here: {plan['bottleneck']}")
    if assumed := plan["encode"]:
        flops, peak = assumed["flops_per_clip"] / 1e12, assumed["peak_flops"] / 1e12
        usual, low, high = (f"{100 * assumed['share_of_peak'][key]:.0f}" for key in ("value", "low", "high"))
        network = f"; autoencoder: {assumed['autoencoder']}" if assumed["autoencoder"] else ""
        lines.append(
            f"assumed: encoding takes {flops:.3g} TFLOP a clip and reaches {usual}% ({low} to {high}%) of "
            f"the {peak:.0f} TFLOP/s of {assumed['accelerator']}; --mfu or a clips_per_accelerator_second in --prices "
            f"overrides that{network}"
        )
    return lines


def _balance(figures: Mapping[str, Mapping[str, float]]) -> str:
    """How much of the other stage's capacity waits."""
    if "decode_clips_per_second_there" not in figures:
        return ""
    decode, encode = (figures[f"{stage}_clips_per_second_there"]["value"] for stage in ("decode", "encode"))
    what = "accelerators" if decode < encode else "decoding cores"
    return f" ({min(decode, encode) / max(decode, encode):.0%} of the {what} are busy)"


def _size_unit(size: float) -> tuple[float, str]:
    name, unit = next((entry for entry in _BYTES if size >= entry[1]), _BYTES[-1])
    return unit, name


def _range_text(figure: Mapping[str, float], unit: float, name: str) -> str:
    value, low, high = (f"{figure[key] / unit:,.3g}" for key in ("value", "low", "high"))
    return f"{value} {name} ({low} to {high})"


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a run prints in the end; beside its plan where one is in the output."""
    refused = f" ({_counts(summary['reasons'])})" if summary["reasons"] else ""
    lines = [
        f"{summary['samples']} samples in {summary['shards']} shards ({summary['bytes'] / 1e6:.1f} MB), "
        f"{summary['quarantined']} of {summary['clips']} clips refused{refused}"
    ]
    if "shapes" in summary:
        lines.append("samples by shape: " + shape_counts(summary["shapes"], "samples"))
    if summary["done"]:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary["stage_seconds"].items())
        lines.append(
            f"this run: {summary['done']} clips in {summary['seconds']:.1f} s, "
            f"{summary['clips_per_second']:.2f} clips/s; over all processes: {stages}"
        )
    else:
        lines.append("nothing was left to do")
    for field, made in summary["fields"].items():
        absent = f", missing: {_counts(made['missing'])}" if made["missing"] else ""
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made["stage_seconds"].items())
        done = f"; this run: {made['done']} in {made['seconds']:.1f} s ({stages})" if made["done"] else ""
        lines.append(f"{field}: {made['samples']} samples ({made['bytes'] / 1e6:.1f} MB){absent}{done}")
    rows = predicted_rows(summary["output"], summary)
    if rows:
        lines.append("predicted against actual:")
    lines += [f"  {what}: {value} ({low} to {high}), actual {actual}" for what, value, low, high, actual in rows]
    return [*lines, f"dataset: {summary['output']}"]


def predicted_rows(output: str, summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """``(what, predicted, low, high, actual)`` of a run that was planned; none of one that was not."""
    plan = read_plan(output)
    rows = compare(plan, summary) if plan else []
    shown = [(row, *_SHOWN[row["what"]]) for row in rows]
    names = ("predicted", "low", "high", "actual")
    return [(what, *(f"{row[name] / unit:,.4g}" for name in names)) for row, what, unit in shown]


def read_plan(output: str) -> dict[str, Any] | None:
    """``plan.json`` of an output; None where there is none of this program."""
    try:
        plan = storage.read_json(storage.join(output, "plan.json"))
    except (FileNotFoundError, ValueError):
        return None
    return plan if isinstance(plan, dict) and "figures" in plan else None


def shape_counts(shapes: Sequence[Mapping[str, Any]], what: str) -> str:
    """What there is of each shape."""
    return ", ".join(f"{one['size'][1]}x{one['size'][0]}x{one['frames']} {one[what]}" for one in shapes)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _ranges(figures: Mapping[tuple[str, float], Mapping[str, float]]) -> list[str]:
    return [
        f"  {what}: {value['value'] / unit:,.4g} ({value['low'] / unit:,.4g} to {value['high'] / unit:,.4g})"
        for (what, unit), value in figures.items()
    ]
