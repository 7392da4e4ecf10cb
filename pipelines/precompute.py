"""Turn a manifest of clips (or a folder of videos) into a dataset of latents.

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cinemo import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--manifest", help=".parquet, .csv or .jsonl of clips, or a folder of videos")
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
    parser.add_argument("--verify", action="store_true", help="only check a finished dataset (needs no --manifest)")
    parser.add_argument("--sample", type=int, default=8, metavar="N", help="samples that --verify encodes again")
    arguments = parser.parse_args(argv)
    recipe = cli.recipe_of(arguments)
    if arguments.verify:
        from cinemo.data.verify import sentences, verify

        print(*sentences(verify(arguments.output, recipe, arguments.sample)), sep="\n")
        return
    if arguments.manifest is None:
        parser.error("the following arguments are required: --manifest")
    if arguments.plan:
        from cinemo.data.estimate import plan_only

        print_plan(plan_only(recipe, arguments.manifest, arguments.output, arguments.limit), arguments.output)
        return
    from cinemo.data.precompute import run

    print_summary(run(recipe, arguments.manifest, arguments.output, arguments.limit, arguments.retry_quarantine))


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
    for field, made in summary["fields"].items():
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made["stage_seconds"].items())
        done = f"; this run: {made['done']} in {made['seconds']:.1f} s ({stages})" if made["done"] else ""
        absent = f", missing: {made['missing']}" if made["missing"] else ""
        print(f"{field}: {made['samples']} samples ({made['bytes'] / 1e6:.1f} MB){absent}{done}")
    print(f"dataset: {summary['output']}")


if __name__ == "__main__":
    cli.run(main)
