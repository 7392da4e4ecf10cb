"""Measure which motion scale a bundle follows: 0..19, larger = more motion, or 100 x SSIM, larger = stiller."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cinemo import cli, storage
from cinemo.progress import doing
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument(
        "--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://"
    )
    parser.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture to animate; repeat for more evidence"
    )
    parser.add_argument("--prompt", action="append", default=[], help="one per --image, in order (default: empty)")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: what the bundle's recipe says)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated videos")
    parser.add_argument("--output", metavar="FILE.json", help="also write the figures there")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    arguments = parser.parse_args(argv)
    if len(arguments.prompt) > len(arguments.image):
        raise InputError(f"--prompt: given {len(arguments.prompt)} times for {len(arguments.image)} images")
    with cli.libraries():
        from cinemo.animate import load_image
        from cinemo.bundle import load_bundle
        from cinemo.evaluation.probe import probe_motion_scale
        from cinemo.media.motion import MORE_MOTION, STILLER

    prompts = [*arguments.prompt, *[""] * (len(arguments.image) - len(arguments.prompt))]
    images = [(load_image(image), prompt) for image, prompt in zip(arguments.image, prompts, strict=True)]
    if arguments.output:
        storage.check_writable(arguments.output.rpartition("/")[0] or ".")
    bundle = load_bundle(arguments.bundle, arguments.device)
    with doing("animating", 0, "videos") as work:
        probe = probe_motion_scale(bundle, images, arguments.steps, arguments.seed, work.reach)
    means = [sum(column) / len(column) for column in zip(*probe.ssim, strict=True)]
    print("motion id " + "".join(f"{number:7.0f}" for number in probe.ids))
    print("mean SSIM " + "".join(f"{mean:7.3f}" for mean in means))
    for scale, correlation, change, error in (
        (MORE_MOTION, probe.more_motion, probe.change_more_motion, probe.error_more_motion),
        (STILLER, probe.stiller, probe.change_stiller, probe.error_stiller),
    ):
        print(f"{scale + ':':40} rank {correlation:+.2f}, SSIM changes by {change:+.2f}, off by {error:.2f}")
    print(f"it follows: {probe.verdict or 'neither clearly; give more images or steps'}")
    print(f"the bundle says: {bundle.motion.scale}")
    if arguments.output:
        storage.write_bytes(arguments.output, (json.dumps(probe.to_json(), indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
