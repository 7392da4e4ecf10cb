"""Checkpoints and published weights -> what others load: a bundle, a LoRA adapter, or a folder for ``train.init``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import cinemo
from cinemo import cache, storage
from cinemo.bundle import save_bundle
from cinemo.config import Recipe, parse_recipe
from cinemo.media.motion import MORE_MOTION
from cinemo.methods import method_class
from cinemo.networks.lora import add_lora, merge_lora, save_adapter
from cinemo.networks.weights import load_unet, published_config, read_config, resolve, save_network, weights_digest
from cinemo.training.checkpoint import checkpoints
from cinemo.training.checkpoint.shares import STATE, WEIGHT, Shares
from cinemo.training.run.averaging import EMA
from cinemo.types import InputError, keyed_seed

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
    networks = consolidated(cache.localize(card.uri), recipe)
    provenance = {"source": "training", "checkpoint": card.uri, "step": card.step, "dataset": card.dataset}
    if recipe.train.ema_decay:
        provenance["ema_decay"] = recipe.train.ema_decay
    digest = save_bundle(target, recipe, networks, provenance | {"cinemo": cinemo.__version__})
    return f"bundle {digest[:12]} of step {card.step} ({recipe.name})"


def adapter_from_checkpoint(location: str, output: str) -> str:
    """Write what LoRA has learnt in a checkpoint, for peft and diffusers (`cinemo.networks.lora.save_adapter`).

    Raises:
        InputError: no complete checkpoint there, it was not trained with LoRA, or ``output`` cannot be used.
    """
    target = _target(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{output}: is not empty; choose another --output")
    card = checkpoints.find(location)
    recipe = parse_recipe(dict(card.recipe), f"checkpoint {card.uri}")
    networks = _as_trained(cache.localize(card.uri), recipe)
    # peft and diffusers know one network, whose layers bear no further name.
    alone = len(networks) == 1
    layers = {
        name if alone else f"{part}.{name}": value
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    }
    names = save_adapter(layers, recipe.train, target)
    return f"adapter of rank {recipe.train.lora_rank} on {len(names)} layers, step {card.step} ({recipe.name})"


def consolidated(directory: Path, recipe: Recipe) -> dict[str, nn.Module]:
    """The networks of a complete local checkpoint, float32, put together from the shares of all ranks; LoRA is merged.

    With ``train.ema_decay`` the averaged weights. Values go from the files straight into the networks: they are in
    memory once, and nothing beside them but the layers that LoRA changed.

    Raises:
        RunError: the checkpoint is of another network.
    """
    networks = _as_trained(directory, recipe)
    if recipe.train.trainable != "lora":
        return networks
    with torch.device("meta"):
        merged = method_class(recipe).fresh_networks(recipe)
    for part, network in networks.items():
        merged[part].load_state_dict(merge_lora(network.state_dict(), recipe.train), assign=True)
    return merged


def _as_trained(directory: Path, recipe: Recipe) -> dict[str, nn.Module]:
    networks = method_class(recipe).fresh_networks(recipe)  # buffers hold formulas, which training may have rounded
    with Shares(directory / STATE) as stored:
        for part, network in networks.items():
            if recipe.train.trainable == "lora":
                add_lora(network, recipe.train)
            for name, parameter in network.named_parameters():
                name = f"{part}.{name}"
                # What is frozen has no average.
                key = EMA if recipe.train.ema_decay and stored.has(EMA, name) else WEIGHT
                stored.read(key, name, parameter.shape, parameter.detach().view(-1))
    return networks


def from_cinemo(folder: str, output: str, recipe: Recipe, scale: str = MORE_MOTION) -> str:
    """Write the bundle of the published Cinemo weights: a folder with unet, vae, [vae_temporal_decoder], text_encoder,
    tokenizer and [scheduler], each in diffusers layout.

    Args:
        recipe: what the folder does not say: size, frames, noise levels (the published pipeline sets its own as well),
            sampling defaults. The network is what ``unet/config.json`` says, where that is there.
        scale: of its motion ids (`cinemo.media.motion.MotionScale`); ``pipelines/probe_motion.py`` measures it.

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
    digest = save_bundle(target, recipe, {"unet": unet}, provenance, scale)
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
    save_network(unet, target)
    return f"UNet weights; train with --recipe {recipe.name} --set train.init={output}"


def _target(output: str) -> Path:
    if storage.is_remote(output):
        raise InputError(f"output {output}: expected a local directory; upload it afterwards")
    return storage.local_path(output)
