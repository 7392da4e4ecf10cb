"""Train a motion model on a dataset of latents (written by pipelines/precompute.py), on one machine or a cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from cinemo import cli
from cinemo.config import Recipe
from cinemo.data.loading.source import Source
from cinemo.progress import doing
from cinemo.training.report.profiled import ProfileRequest


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="URI[=WEIGHT]",
        help="dataset directory, local or s3://; repeatable: each then gets its weight's share of every batch (1 where "
        "none is given; a URI that ends in =NUMBER itself needs a weight behind it)",
    )
    parser.add_argument(
        "--stills",
        action="append",
        default=[],
        metavar="URI[=WEIGHT]",
        help="as --data, but each clip shows its first frame all the time, as a clip without motion",
    )
    parser.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="which samples are seen, by what is stored of them: \"ssim < 0.98 and 'dog' in caption\"; the same as "
        "--set train.where=...",
    )
    parser.add_argument("--output", metavar="URI", help="run directory, local or s3://")
    parser.add_argument(
        "--validation",
        metavar="FILE|DIR",
        help="pictures and prompts that sample sheets animate beside the dataset's samples: a .jsonl, .csv or "
        ".parquet with image, prompt and any controls, or a folder of pictures with .txt beside them; local or s3://; "
        "a run that goes on keeps them; none: no more",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="the same as --set train.max_steps=N")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|URI",
        help="auto: continue what --output holds, or start; never: insist on an empty --output; URI: start a new run "
        "from a checkpoint, at its step; with another --data than it was made with, that one's first epoch comes next",
    )
    parser.add_argument(
        "--change-batch",
        action="store_true",
        help="go on from a checkpoint that was made with another train.global_batch or train.lanes: the samples that "
        "its epoch has not seen come next, each once; with --verify-resume: prove that as well",
    )
    parser.add_argument(
        "--skip-steps",
        action="append",
        metavar="FIRST[-LAST]",
        help="steps to pass over, as reports count them, when a run goes on from a checkpoint before them; repeatable; "
        "the same as --set train.skip_steps=[...]",
    )
    parser.add_argument(
        "--skip-sample",
        action="append",
        metavar="ID",
        help="a sample to leave out from here on, as the log in order/ names it; repeatable; the same as "
        "--set train.skip_samples=[...]",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write curves and sample sheets for TensorBoard into tensorboard/ of --output too; the same as "
        "--set train.tensorboard=true",
    )
    cli.add_break_lock(parser)
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="profile steps FIRST:LAST, as reports count them, or a number of steps soon after the start: a trace, "
        "tables and on accelerators a memory snapshot into profile/ of --output and into MLflow",
    )
    parser.add_argument("--profile-all-ranks", action="store_true", help="with --profile: every worker, not the first")
    parser.add_argument(
        "--verify-resume",
        action="store_true",
        help="prove here and on this dataset that a resume neither repeats nor loses a sample: trains twice under "
        "--output, once killed and resized",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only say what the run will take: FLOPs, memory of a worker, time (needs neither --data nor --output)",
    )
    parser.add_argument(
        "--accelerator",
        metavar="NAME",
        help="with --plan: what to plan for, such as A100-80GB; here: this machine, measured (default: A100-80GB for a "
        "recipe with train.gpus_per_worker, else here)",
    )
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="with --plan: share of the accelerator's peak that training reaches"
    )
    parser.add_argument(
        "--prices", metavar="FILE", help="with --plan: JSON of prices (currency, accelerator_hour, core_hour)"
    )
    arguments = parser.parse_args(argv)
    if arguments.profile_all_ranks and arguments.profile is None:
        parser.error("--profile-all-ranks only works with --profile")
    if arguments.profile is not None and (arguments.plan or arguments.verify_resume):
        parser.error("--profile is for a training, not for --plan or --verify-resume")
    if not arguments.plan:
        for name in ("accelerator", "mfu", "prices"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} only works with --plan")
        missing = ["--data"] * (not arguments.data + arguments.stills) + ["--output"] * (arguments.output is None)
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
    if arguments.where is not None:
        arguments.assignments.append(f"train.where={json.dumps(arguments.where)}")
    for key, value in (("skip_steps", arguments.skip_steps), ("skip_samples", arguments.skip_sample)):
        if value is not None:
            arguments.assignments.append(f"train.{key}={json.dumps(value)}")
    if arguments.tensorboard:
        arguments.assignments.append("train.tensorboard=true")
    if arguments.max_steps is not None:
        arguments.assignments.append(f"train.max_steps={arguments.max_steps}")
    recipe = cli.recipe_of(arguments)
    profile = ProfileRequest.parse(arguments.profile, arguments.profile_all_ranks) if arguments.profile else None
    sources = [Source.parse(text) for text in arguments.data]
    sources += [Source.parse(text, still=True) for text in arguments.stills]

    if arguments.plan:
        plan(arguments, recipe, sources)
        return
    if arguments.verify_resume:
        with cli.libraries():
            from cinemo.training.run.proof import verify_resume

        lines = verify_resume(recipe, sources, arguments.output, __file__, arguments.change_batch)
        print(*lines, sep="\n")
        return
    with cli.libraries():
        from cinemo.training.run import worker  # late: --help and bad flags need neither torch nor Ray

    summary = worker.run(
        recipe,
        sources,
        arguments.output,
        arguments.resume,
        arguments.break_lock,
        arguments.change_batch,
        profile,
        arguments.validation,
    )
    print(
        f"{summary.steps} steps, loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}, "
        f"{summary.samples_per_second:.1f} samples/s; "
        + (f"{summary.skipped_steps} steps skipped, their gradient was not finite; " if summary.skipped_steps else "")
        + f"checkpoint: {summary.checkpoint}"
    )


def plan(arguments: argparse.Namespace, recipe: Recipe, sources: Sequence[Source]) -> None:
    """Print the estimate; with ``--output`` write it to ``plan.json`` there too. Datasets that are given are asked for
    the states of encoders that need not be loaded then.
    """
    with cli.libraries():
        from cinemo import storage
        from cinemo.data.precompute.prices import read_prices
        from cinemo.training.plan.estimate import plan_training
        from cinemo.training.plan.wording import plan_lines
        from cinemo.training.run.growth import opened
        from cinemo.training.run.stored_states import with_stored_states

    prices = read_prices(arguments.prices) if arguments.prices else None
    output = storage.absolute(arguments.output) if arguments.output else None
    if output:
        storage.check_writable(output)
    if sources:
        recipe, lines = with_stored_states(recipe, opened(sources))
        print(*lines, sep="\n", end="\n" if lines else "")
    with doing("counting operations and memory"):
        estimate = plan_training(recipe, arguments.accelerator, arguments.mfu, prices)
    if output:
        storage.write_json(storage.join(output, "plan.json"), estimate)
    print(*plan_lines(estimate, output), sep="\n")


if __name__ == "__main__":
    cli.run(main)
