"""The estimate of a training in words, for the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cinemo import storage

_PARTS = (
    *("weights", "gradients", "optimizer", "activations", "buffers", "inputs", "kernels", "kept"),
    *("checkpoints", "peak", "host"),
)
_ON_CPUS = {
    "kernels": "kernels: what the CPU's kernel library keeps in bfloat16",
    "kept": "kept: freed memory that a process on CPUs holds on to",
}


def plan_lines(plan: Mapping[str, Any], output: str | None) -> list[str]:
    """What ``train.py --plan`` prints."""
    parameters, flops, step = plan["parameters"], plan["flops_per_sample"], plan["flops_per_step"]
    memory, device, speed = plan["memory"], plan["accelerator"], plan["speed"]
    again = " (including what gradient checkpointing repeats)" if flops["executed"] > flops["training"] else ""
    frozen = [
        f"a frozen {name.replace('_', ' ')} of {plan[name]['parameters']:,} ({plan[name]['source']})"
        for name in ("text_encoder", "image_encoder")
        if plan[name]
    ]
    lines = [
        f"{plan['recipe']}: {parameters['total']:,} parameters, {parameters['trainable']:,} of them trained; "
        + (f"plus {' and '.join(frozen)}" if frozen else "no frozen encoder: its states are stored"),
        *(
            [
                "planned as if every sample had the largest of the recipe's shapes, "
                f"{shape[0]} frames of {shape[2]}x{shape[1]}"
            ]
            if (shape := plan["largest_shape"])
            else []
        ),
        f"FLOPs: forward {_tera(flops['forward'])} per sample; a step of {plan['samples_per_step']} samples "
        f"{_tera(step['training'])}, executed {_tera(step['executed'])}{again}",
        f"memory of each of {plan['workers']} workers in GB, micro batch {plan['micro_batch']}, "
        f"{plan['accumulation']} per step; {device['name']} has {device['memory'] / 1e9:.1f}"
        + (f", {device['reserved'] / 1e9:.0f} of it not for tensors" if device["reserved"] else ""),
        *([f"auto: {plan['chosen']}"] if plan["chosen"] else []),
        *_table(memory),
        "  *: this recipe; peak: the most at one time, less than the sum because gradients come as activations go; "
        "buffers: DeepSpeed's buckets, gathered weights, the optimizer's temporaries; inputs: frozen encoders, "
        "text states, batches; checkpoints: copies in host memory that are being written"
        + "".join(f"; {said}" for part, said in _ON_CPUS.items() if memory["recipe"][part]),
    ]
    if not memory["fits"]:
        lines.append(
            f"  this recipe does not fit: {memory['recipe']['peak'] / 1e9:.1f} GB; lower train.micro_batch, or "
            "see what fits"
        )
    lines += [
        f"time: {speed['peak'] / 1e12:,.4g} TFLOP/s at most, MFU {speed['mfu']:.3g} ({speed['source']}): "
        f"{plan['seconds_per_step']:.3g} s per step, {plan['hours']:,.4g} hours for {plan['steps']:,} steps, "
        + (f"{plan['accelerator_hours']:,.4g} accelerator hours, " if "accelerator_hours" in plan else "")
        + f"{plan['core_hours']:,.4g} core hours"
    ]
    if kept := plan["snapshots"]:
        lines.append(
            f"averages for export.py --ema-std: {kept['count']} snapshots, one every {kept['every']:,} steps, take "
            f"{kept['bytes'] / 1e9:,.1f} GB in the output"
        )
    lines += _fastest(plan["fastest"])
    if "costs" in plan:
        items = ", ".join(f"{name} {value:,.2f}" for name, value in plan["costs"].items())
        lines.append(f"cost in {plan['currency']}: {items}")
    return [*lines, f"written to {storage.join(output, 'plan.json')}"] if output else lines


def _table(memory: Mapping[str, Any]) -> list[str]:
    parts = [part for part in _PARTS if part not in _ON_CPUS or any(row[part] for row in memory["rows"])]
    keys = ("zero_stage", "checkpointing", "offload")
    lines = ["  ZeRO  checkpointing  offload  " + "  ".join(f"{part:>11}" for part in parts)]
    for row in memory["rows"]:
        mark = "*" if all(row[key] == memory["recipe"][key] for key in keys) else " "
        values = "  ".join(f"{row[part] / 1e9:>11.2f}" for part in parts)
        lines.append(
            f"{mark} {row['zero_stage']:<4}  {row['checkpointing']:<13}  {row['offload']:<9}{values}"
            + ("" if row["fits"] else "  does not fit")
        )
    return lines


def _fastest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    heads = ("accelerator", "micro batch", "checkpointing", "ZeRO", "offload")
    keys = ("accelerator", "micro_batch", "gradient_checkpointing", "zero_stage", "offload")
    lines = [
        "the fastest that fits with a tenth to spare (train.micro_batch, train.gradient_checkpointing, "
        "train.zero_stage, train.offload; auto chooses it):",
        "  " + "  ".join(f"{head:<11}" for head in heads) + "     GB     hours  of this recipe's",
    ]
    for row in rows:
        share = "does not fit" if row["share"] is None else f"{row['share']:.2f}"
        lines.append(
            "  " + "  ".join(f"{row[key]!s:<{max(11, len(head))}}" for key, head in zip(keys, heads, strict=True))
            + f"  {row['peak'] / 1e9:>5.1f}  {row['hours']:>8,.1f}  {share}"
        )  # fmt: skip
    return lines


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.4g} TFLOP"
