"""Make a model bundle or a LoRA adapter from a training checkpoint, or import published weights.

A checkpoint has its own recipe; --recipe and --set say what imported weights are, where their folder does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from cinemo import cli
from cinemo.progress import doing
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    with cli.libraries():
        from cinemo.methods import published_sources

    parser = cli.parser(__doc__, recipe="cinemo-320x512")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", metavar="URI", help="a run's --output (its latest checkpoint) or one checkpoint"
    )
    for name, published in published_sources().items():
        source.add_argument(f"--from-{name}", metavar=published.takes, help=published.description)
    source.add_argument("--bundle", metavar="DIR", help="with --as-published: a bundle to write for the published code")
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="write the weights of a --bundle as one file that the published code of its method reads",
    )
    parser.add_argument(
        "--motion-scale",
        choices=("more", "stiller"),
        default="more",
        help="of imported motion ids: more (0..19, larger = more motion) or stiller (100 x SSIM, larger = "
        "stiller); pipelines/probe_motion.py tells which",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write only what a --checkpoint trained with LoRA has learnt, for peft and diffusers",
    )
    parser.add_argument(
        "--ema-std",
        type=float,
        metavar="WIDTH",
        help="of a --checkpoint trained with train.posthoc_ema: hold the average of this relative width, e.g. 0.08",
    )
    parser.add_argument(
        "--register", metavar="NAME", help="enter the bundle of a --checkpoint in MLflow's model registry under NAME"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new directory for the result, or file")
    arguments = parser.parse_args(argv)

    with cli.libraries():
        from cinemo.media.motion import MORE_MOTION, STILLER
        from cinemo.training.checkpoint import checkpoints, export  # late: --help and bad flags need no torch
        from cinemo.training.checkpoint.profiles import NARROWEST, WIDEST
        from cinemo.training.checkpoint.registry import register, tracked_run

    if arguments.adapter and not arguments.checkpoint:
        raise InputError("--adapter: only a --checkpoint has one; expected --checkpoint URI --adapter")
    if arguments.register and (arguments.adapter or not arguments.checkpoint):
        raise InputError(
            "--register: only for a bundle made from a checkpoint; expected --checkpoint URI --register NAME"
        )
    if arguments.ema_std is not None and (arguments.adapter or not arguments.checkpoint):
        raise InputError(
            "--ema-std: only for a bundle made from a checkpoint; expected --checkpoint URI --ema-std WIDTH"
        )
    if arguments.ema_std is not None and not NARROWEST <= arguments.ema_std <= WIDEST:
        raise InputError(f"--ema-std is {arguments.ema_std:g}, expected a share of the training, {NARROWEST}..{WIDEST}")
    if bool(arguments.bundle) != arguments.as_published:
        raise InputError("--as-published: is of a bundle; expected --bundle DIR --as-published --output FILE")
    recipe = cli.recipe_of(arguments)
    if arguments.bundle:
        with doing("writing weights as published"):
            made = export.as_published(arguments.bundle, arguments.output)
    elif arguments.checkpoint:
        if arguments.assignments:
            raise InputError("--set: a checkpoint has its own recipe; expected --set with weights that are imported")
        if arguments.register:
            tracked_run(checkpoints.find(arguments.checkpoint).uri)  # before minutes of work
        with doing("putting the checkpoint's weights together"):
            if arguments.adapter:
                made = export.adapter_from_checkpoint(arguments.checkpoint, arguments.output)
            else:
                made = export.from_checkpoint(arguments.checkpoint, arguments.output, arguments.ema_std)
        if arguments.register:
            with doing("registering the bundle"):
                made += f"; {register(arguments.output, arguments.register)}"
    else:
        scale = {"more": MORE_MOTION, "stiller": STILLER}[arguments.motion_scale]
        name = next(name for name in published_sources() if getattr(arguments, f"from_{name}"))
        with doing("reading published weights"):
            made = export.from_published(name, getattr(arguments, f"from_{name}"), arguments.output, recipe, scale)
    print(f"{arguments.output}: {made}")


if __name__ == "__main__":
    cli.run(main)
