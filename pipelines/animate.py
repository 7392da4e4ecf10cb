"""Animate an image: one picture and a prompt in, one mp4 out.

With --source-video the motion comes from a video: give its edited first frame as --image to edit it, or any other
picture to make it move in the same way.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from cinemo import cli, storage
from cinemo.animate import AnimateRequest, animate, load_image, load_source
from cinemo.bundle import load_bundle, read_card
from cinemo.media.saving import save_animation, save_latents
from cinemo.types import InputError

_RECIPE = "(default: what the bundle's recipe says)"


def parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__, recipe=None)
    made.add_argument("--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://")
    made.add_argument("--image", required=True, metavar="FILE", help="the picture, any size; also s3://")
    made.add_argument("--prompt", required=True, help="what happens")
    made.add_argument("--output", required=True, metavar="FILE.mp4", help="where to write; also s3://")
    made.add_argument("--negative-prompt", default="", help="what should not appear")
    motion = made.add_mutually_exclusive_group()
    motion.add_argument("--motion-bucket", type=int, metavar="0..19", help=f"larger = more motion {_RECIPE}")
    motion.add_argument("--motion-strength", type=float, metavar="0..1", help="the same on a scale of 0 to 1")
    made.add_argument("--steps", type=int, help=f"DDIM steps {_RECIPE}")
    made.add_argument("--guidance-scale", type=float, help=f"classifier-free guidance, 1 = off {_RECIPE}")
    made.add_argument("--solver", choices=("ddim", "multistep"), help=f"multistep needs about 20 steps {_RECIPE}")
    made.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help=f"part of the noise range 0..1 where guidance acts; a step outside costs half {_RECIPE}",
    )  # fmt: skip
    made.add_argument(
        "--reuse-features", type=int, metavar="N", help=f"run the inner layers only at every Nth step {_RECIPE}"
    )
    made.add_argument("--seed", type=int, default=0, help="determines every random draw")
    made.add_argument("--no-dct-init", action="store_true", help="plain noise instead of DCTInit")
    made.add_argument("--source-video", metavar="FILE", help="take the motion from this video; also s3://")
    made.add_argument("--source-prompt", default="", help="what --source-video shows")
    made.add_argument("--source-interval", type=int, default=1, metavar="N", help="use every Nth of its frames")
    made.add_argument("--save-latents", metavar="F.npz", help="also write latents (C,F,h,w float32) and settings")
    made.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if not arguments.output.endswith(".mp4"):
        raise InputError(f"--output {arguments.output}: expected a name that ends in .mp4")
    source = None
    if arguments.source_video:
        source = load_source(arguments.source_video, read_card(arguments.bundle).recipe, arguments.source_interval)
    request = AnimateRequest(
        image=load_image(arguments.image),
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        motion_bucket=arguments.motion_bucket,
        motion_strength=arguments.motion_strength,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        dct_init=False if arguments.no_dct_init else None,
        solver=arguments.solver,
        guidance_interval=tuple(arguments.guidance_interval) if arguments.guidance_interval else None,
        reuse_features=arguments.reuse_features,
        source=source,
        source_prompt=arguments.source_prompt,
    )
    storage.check_writable(arguments.output.rpartition("/")[0] or ".")
    bundle = load_bundle(arguments.bundle, arguments.device)
    if bundle.recipe.toy:
        height, width = bundle.recipe.data.size
        print(f"{bundle.recipe.name} is a toy of {width}x{height} pixels, to show the method at work", file=sys.stderr)
    begun = time.monotonic()

    def progress(done: int, steps: int) -> None:
        seconds = time.monotonic() - begun
        line = f"step {done}/{steps}, {seconds:.0f} s, {seconds / done * (steps - done):.0f} s left"
        print(line, end="\r" if sys.stderr.isatty() and done < steps else "\n", file=sys.stderr, flush=True)

    animation = animate(bundle, request, progress)
    save_animation(arguments.output, animation)
    if arguments.save_latents:
        save_latents(arguments.save_latents, animation)
    print(f"{arguments.output}: {len(animation.frames_FHWC)} frames, {animation.settings}")


if __name__ == "__main__":
    cli.run(main)
