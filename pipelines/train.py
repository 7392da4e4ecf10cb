"""Train a motion model on a dataset of latents (written by pipelines/precompute.py), on one machine or a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from cinemo import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--data", required=True, metavar="URI", help="dataset directory, local or s3://")
    parser.add_argument("--output", required=True, metavar="URI", help="run directory, local or s3://")
    parser.add_argument("--max-steps", type=int, metavar="N", help="the same as --set train.max_steps=N")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|URI",
        help="auto: continue what --output holds, or start; never: insist on an empty --output; URI: start a new run "
        "from a checkpoint",
    )
    parser.add_argument(
        "--verify-resume",
        action="store_true",
        help="prove here and on this dataset that a resume repeats and loses no sample: trains twice under --output, "
        "once killed and resized",
    )
    arguments = parser.parse_args(argv)
    if arguments.max_steps is not None:
        arguments.assignments.append(f"train.max_steps={arguments.max_steps}")
    recipe = cli.recipe_of(arguments)

    if arguments.verify_resume:
        from cinemo.training.proof import verify_resume

        print("\n".join(verify_resume(recipe, arguments.data, arguments.output, __file__)))
        return
    from cinemo.training import worker  # late: --help and bad flags need neither torch nor Ray

    summary = worker.run(recipe, arguments.data, arguments.output, arguments.resume)
    print(
        f"{summary.steps} steps, loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}, "
        f"{summary.samples_per_second:.1f} samples/s; checkpoint: {summary.checkpoint}"
    )


if __name__ == "__main__":
    cli.run(main)
