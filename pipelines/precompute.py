"""Turn a manifest of clips (or a folder of videos) into a dataset of latents.

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from cinemo import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--manifest", required=True, help=".parquet, .csv or .jsonl of clips, or a folder of videos")
    parser.add_argument("--output", required=True, metavar="URI", help="directory of the dataset, local or s3://")
    parser.add_argument("--plan", action="store_true", help="only measure a few clips and say what a run will cost")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N clips only")
    parser.add_argument(
        "--retry-quarantine",
        nargs="?",
        const="",
        metavar="REASON",
        help="try refused clips of a finished dataset again: those of REASON, or all",
    )
    arguments = parser.parse_args(argv)
    recipe = cli.recipe_of(arguments)
    if arguments.plan:
        from cinemo.data.estimate import plan_only

        print_plan(plan_only(recipe, arguments.manifest, arguments.output, arguments.limit), arguments.output)
        return
    from cinemo.data.precompute import run
    from cinemo.data.tracker import tracked

    with tracked(recipe, arguments.output) as tracker:
        summary = run(
            recipe, arguments.manifest, arguments.output, arguments.limit, arguments.retry_quarantine, tracker
        )
        page = write_report(summary)
        if tracker:
            tracker.close(summary, page)
    print_summary(summary)


def write_report(summary: dict[str, Any]) -> str | None:
    """``report.html`` beside the dataset; a machine that only decodes need not have what draws it."""
    if importlib.util.find_spec("matplotlib") is None:
        print("report.html is left out: matplotlib is not installed (pip install 'cinemo[report]')")
        return None
    from cinemo.evaluation.dataset_report import write_dataset_report

    return write_dataset_report(summary["output"], summary)


def print_plan(plan: dict[str, Any], output: str) -> None:
    seconds = ", ".join(
        f"{stage} {value:.3f}" for stage, value in plan["seconds_per_clip"].items() if value is not None
    )
    print(f"{plan['clips']} clips -> {plan['shards']} shards, about {plan['expected_samples']} samples")
    print(f"seconds per clip ({plan['measured_clips']} measured): {seconds}")
    print(f"decode and score: {plan['decode_and_score_clips_per_second_per_core']:.2f} clips/s per core")
    print(f"bottleneck here: {plan['bottleneck']}, {plan['clips_per_second_here']:.2f} clips/s")
    hours = "not measured (no accelerator here)" if plan["encoder_hours"] is None else f"{plan['encoder_hours']:.2f} h"
    print(f"decoding {plan['decode_core_hours']:.2f} core hours, encoding {hours}")
    if plan["bytes"] is not None:
        print(f"size {plan['bytes'] / 1e6:.1f} MB")
    print(f"expected quarantine {plan['expected_quarantine_share']:.1%} {plan['refused_in_sample'] or ''}".rstrip())
    print(f"written to {output}/plan.json")


def print_summary(summary: dict[str, Any]) -> None:
    refused = ", ".join(f"{reason} {count}" for reason, count in summary["reasons"].items())
    print(
        f"{summary['samples']} samples in {summary['shards']} shards ({summary['bytes'] / 1e6:.1f} MB), "
        f"{summary['quarantined']} of {summary['clips']} clips refused{f' ({refused})' if refused else ''}"
    )
    if summary["done"]:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary["stage_seconds"].items())
        print(
            f"this run: {summary['done']} clips in {summary['seconds']:.1f} s, "
            f"{summary['clips_per_second']:.2f} clips/s; over all processes {stages}"
        )
    else:
        print("nothing was left to do")
    print(f"dataset: {summary['output']}")


if __name__ == "__main__":
    cli.run(main)
