"""Checkpoints and published weights -> what others load: a model bundle, or a folder for ``train.init``."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

import cinemo
from cinemo import cache, storage
from cinemo.bundle import MORE_MOTION, save_bundle
from cinemo.config import Recipe, parse_recipe
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.weights import load_unet, published_config, read_config, resolve, save_unet, weights_digest
from cinemo.training import checkpoints
from cinemo.training.engine import import_deepspeed, state_directory
from cinemo.types import InputError, keyed_seed

_UNET = "unet."  # the name of the network inside `cinemo.methods.cinemo.CinemoMethod`
_PUBLISHED = {
    "vae": "vae",
    "vae_decoder": "vae_temporal_decoder",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
}
_SCHEDULER = "scheduler_config.json"


def from_checkpoint(location: str, output: str) -> str:
    """Write the bundle of a checkpoint, its weights consolidated to float32; returns a line about it.

    Args:
        location: a run's output directory (its latest complete checkpoint) or one checkpoint; local or s3://.
        output: new local directory.

    Raises:
        InputError: no complete checkpoint there, or ``output`` cannot be used.
    """
    target = _target(output)
    card = checkpoints.find(location)
    recipe = parse_recipe(dict(card.recipe), f"checkpoint {card.uri}")
    unet = consolidated_unet(cache.localize(card.uri), recipe)
    provenance = {"source": "training", "checkpoint": card.uri, "step": card.step, "dataset": card.dataset}
    digest = save_bundle(target, recipe, unet, provenance | {"cinemo": cinemo.__version__})
    return f"bundle {digest[:12]} of step {card.step} ({recipe.name})"


def consolidated_unet(directory: Path, recipe: Recipe) -> LavieUNet:
    """The UNet of a complete local checkpoint, float32, put together from the shares of all ranks."""
    import_deepspeed("cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    inside = state_directory(directory)
    if any(inside.glob("*_optim_states.pt")):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints what it finds, and bars
            state = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=inside.name)
    else:  # stage 0 in float32 keeps no separate master weights
        (file,) = inside.glob("mp_rank_00_model_states.pt")
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    weights: dict[str, Tensor] = {
        name.removeprefix(_UNET): value for name, value in state.items() if name.startswith(_UNET)
    }
    unet = LavieUNet(**recipe.model.model_dump())
    # Buffers hold formulas, exact in the fresh network and rounded in one that was trained in bfloat16.
    weights |= dict(unet.named_buffers())
    unet.load_state_dict(weights)
    return unet


def from_cinemo(folder: str, output: str, recipe: Recipe, scale: str = MORE_MOTION) -> str:
    """Write the bundle of the published Cinemo weights: a folder with unet, vae, [vae_temporal_decoder], text_encoder,
    tokenizer and [scheduler], each in diffusers layout.

    Args:
        recipe: what the folder does not say: size, frames, noise levels (the published pipeline sets its own as well),
            sampling defaults. The network is what ``unet/config.json`` says, where that is there.
        scale: of its motion ids (`cinemo.bundle.MotionScale`); ``pipelines/probe_motion.py`` measures which it is.

    Raises:
        InputError: a part is missing, or the weights do not fit the network.
    """
    target, root = _target(output), resolve(folder)
    missing = [name for name in ("unet", *_PUBLISHED.values()) if not (root / name).is_dir()]
    optional = {"vae_temporal_decoder"}
    if set(missing) - optional:
        raise InputError(
            f"{folder}: {', '.join(sorted(set(missing) - optional))} missing; expected a folder with unet, vae, "
            "vae_temporal_decoder, text_encoder and tokenizer"
        )
    places = {field: None if name in missing else str(root / name) for field, name in _PUBLISHED.items()}
    values = recipe.model_dump(mode="json")
    values["encoders"] |= places
    if (root / "unet" / "config.json").is_file():
        values["model"] |= published_config(read_config(root / "unet", f"{folder}/unet"), f"{folder}/unet")
    if (root / "scheduler" / _SCHEDULER).is_file():
        stored = read_config(root / "scheduler", f"{folder}/scheduler", _SCHEDULER)
        values["diffusion"]["prediction"] = "v" if stored.get("prediction_type") == "v_prediction" else "epsilon"
    recipe = parse_recipe(values, folder)
    unet = load_unet(recipe.model, str(root / "unet"), torch.float32)
    provenance = {"source": "published Cinemo weights", "unet": weights_digest(str(root / "unet"))}
    digest = save_bundle(target, recipe, unet, provenance, scale)
    return f"bundle {digest[:12]} of published weights ({recipe.name}), motion ids taken as {scale}"


def from_lavie(file: str, output: str, recipe: Recipe) -> str:
    """Write LaVie's base weights as a folder to start training from; the motion network they lack starts at zero.

    Raises:
        InputError: not a LaVie checkpoint of the recipe's network.
    """
    target = _target(output)
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{output}: is not empty; choose another --output")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "weights"))
        unet = load_unet(recipe.model, file, torch.float32, motion_optional=True)
    save_unet(unet, target)
    return f"UNet weights; train with --recipe {recipe.name} --set train.init={output}"


def _target(output: str) -> Path:
    if storage.is_remote(output):
        raise InputError(f"output {output}: expected a local directory; upload it afterwards")
    return storage.local_path(output)
