"""Animate an image: one picture and a prompt in, one mp4 out.

What else can be asked depends on the model: --bundle DIR --help shows its flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinemo import cli, diagnostics, storage
from cinemo.progress import doing, say
from cinemo.recipes import load_recipe
from cinemo.types import InputError

if TYPE_CHECKING:
    from cinemo.bundle import BundleCard
    from cinemo.methods import Method


def parser(method: type[Method]) -> argparse.ArgumentParser:
    made = cli.parser(__doc__, recipe=None)
    made.add_argument("--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://")
    made.add_argument("--image", required=True, metavar="FILE", help="the picture, any size; also s3://")
    made.add_argument("--prompt", required=True, help="what happens")
    made.add_argument("--output", required=True, metavar="FILE.mp4", help="where to write; also s3://")
    made.add_argument("--size", metavar="WxH", help="of the video, in pixels (default: what the model was trained for)")
    made.add_argument("--lora", metavar="DIR", help="a LoRA adapter of export.py --adapter to animate with")
    made.add_argument("--lora-scale", type=float, default=1.0, metavar="S", help="how much of it; 1 is as trained")
    cli.add_controls(made, method)
    cli.add_inputs(made, method)
    made.add_argument("--save-latents", metavar="F.npz", help="also write latents (C,F,h,w float32) and settings")
    made.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    with cli.libraries():
        from cinemo.animate import AnimateRequest, load_image, load_source, sample, sentences
        from cinemo.bundle import load_bundle
        from cinemo.media.saving import save_frames, save_latents
        from cinemo.methods import method_class
        from cinemo.methods.controls import size_of
        from cinemo.networks.adapters import adapter_name

        card = card_of_bundle(argv)
        recipe = card.recipe if card else load_recipe(cli.DEFAULT_RECIPE)
    method = method_class(recipe)
    arguments, unknown = parser(method).parse_known_args(argv)
    if unknown:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in method.controls_type.model_fields)
        raise InputError(f"{unknown[0]}: {recipe.name} has no such control; it has {flags}")
    if not arguments.output.endswith(".mp4"):
        raise InputError(f"--output {arguments.output}: expected a name that ends in .mp4")
    inputs: dict[str, Any] = {}
    for name, about in method.inputs.items():
        if about.kind == "video" and (file := getattr(arguments, f"{name}_video")):
            inputs[name] = load_source(file, recipe, getattr(arguments, f"{name}_interval"))
        elif about.kind == "image" and (file := getattr(arguments, name)):
            inputs[name] = load_image(file)
    controls = {name: getattr(arguments, name) for name in method.controls_type.model_fields}
    size = size_of(arguments.size) if arguments.size else recipe.data.size
    method.sized(recipe, size)
    lora = f"{adapter_name(Path(arguments.lora))}:{arguments.lora_scale:g}" if arguments.lora else None
    request = AnimateRequest(
        load_image(arguments.image), arguments.prompt, size=size, inputs=inputs, lora=lora, **controls
    )
    if card:  # a fault is told before anything is loaded
        request.settings(recipe, card.motion.calibration, card.quality)
    storage.check_writable(arguments.output.rpartition("/")[0] or ".")
    bundle = load_bundle(arguments.bundle, arguments.device, lora=arguments.lora)
    if bundle.recipe.toy:
        height, width = bundle.recipe.data.size
        say(f"{bundle.recipe.name} is a toy of {width}x{height} pixels, to show the method at work")
    if (warning := bundle.text.tokenizer.warning(arguments.prompt)) is not None:
        print(warning, file=diagnostics.errors())
    with doing("sampling", 0, "steps") as work:
        sampled = sample(bundle, request, work.reach)
    latents_FCHW = sampled.latents_CFHW.transpose(0, 1)
    with doing("decoding and writing", len(latents_FCHW), "frames") as work:
        save_frames(arguments.output, work.counting(bundle.decoder.decoding(latents_FCHW), len), sampled)
    if arguments.save_latents:
        save_latents(arguments.save_latents, sampled)
    told = sentences(sampled)
    print(f"{arguments.output}: {told[0]}", *told[1:], sep="\n")


def card_of_bundle(argv: Sequence[str] | None) -> BundleCard | None:
    """Of the bundle that is named, which decides what flags there are."""
    from cinemo.bundle import read_card

    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    first.add_argument("--bundle")
    try:
        location = first.parse_known_args(argv)[0].bundle
    except argparse.ArgumentError:
        location = None
    return read_card(location) if location else None


if __name__ == "__main__":
    cli.run(main)
