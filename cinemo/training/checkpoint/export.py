"""Checkpoints and published weights -> what others load: a bundle, a LoRA adapter, or a folder for ``train.init``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import cinemo
from cinemo import cache, storage
from cinemo.bundle import load_bundle, save_bundle
from cinemo.config import Recipe
from cinemo.media.motion import MORE_MOTION
from cinemo.methods import method_class, published_sources
from cinemo.networks.lora import add_lora, merge_lora, save_adapter
from cinemo.networks.weights import save_network
from cinemo.recipes import parse_recipe
from cinemo.training.checkpoint import checkpoints
from cinemo.training.checkpoint.shares import STATE, WEIGHT, Shares
from cinemo.training.checkpoint.snapshots import Mixture, mixture
from cinemo.training.run.averaging import EMA, power_average
from cinemo.types import InputError


def from_checkpoint(location: str, output: str, width: float | None = None) -> str:
    """Write the bundle of a checkpoint, its weights consolidated to float32; returns a line about it.

    Args:
        location: a run's output directory (its latest complete checkpoint) or one checkpoint; local or s3://.
        output: new local directory.
        width: of the average that it holds, made of what ``train.posthoc_ema`` left; None: the recipe's own average, or
            the weights.

    Raises:
        InputError: no complete checkpoint there, no average of this width, or ``output`` cannot be used.
    """
    target = _target(output)
    card = checkpoints.find(location)
    recipe = parse_recipe(dict(card.recipe), f"checkpoint {card.uri}")
    average = None
    with cache.borrowed(card.uri) as directory:
        if width is not None:
            average = mixture(card, directory / STATE, recipe.train, width)
        networks = consolidated(directory, recipe, average)
    provenance = {"source": "training", "checkpoint": card.uri, "step": card.step, "dataset": card.dataset}
    made_of = ""
    if average is not None:
        provenance["ema_std"] = width
        made_of = f", averaged with width {width:g} (of {len(average.parts)} snapshots, to within {average.off:.1%})"
    elif recipe.train.ema_decay:
        provenance["ema_decay"] = recipe.train.ema_decay
    digest = save_bundle(target, recipe, networks, provenance | {"cinemo": cinemo.__version__})
    return f"bundle {digest[:12]} of step {card.step}{made_of} ({recipe.name})"


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
    with cache.borrowed(card.uri) as directory:
        networks = _as_trained(directory, recipe)
    # peft and diffusers know one network, whose layers bear no further name.
    alone = len(networks) == 1
    layers = {
        name if alone else f"{part}.{name}": value
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    }
    names = save_adapter(layers, recipe.train, target)
    return f"adapter of rank {recipe.train.lora_rank} on {len(names)} layers, step {card.step} ({recipe.name})"


def as_published(location: str, output: str) -> str:
    """Write the networks of a bundle as the published code of its method reads them; returns a line about it.

    Raises:
        InputError: no bundle there, its method has no such form, or ``output`` exists.
    """
    target = _target(output)
    if target.exists():
        raise InputError(f"{output}: exists; choose another --output")
    bundle = load_bundle(location, "cpu")
    type(bundle.method).write_published(bundle.recipe, bundle.method.networks, target)
    return f"weights of bundle {bundle.digest[:12]} ({bundle.recipe.name}) as they are published"


def consolidated(directory: Path, recipe: Recipe, average: Mixture | None = None) -> dict[str, nn.Module]:
    """The networks of a complete local checkpoint, float32, put together from the shares of all ranks; LoRA is merged.

    With ``average`` its weights, else with ``train.ema_decay`` the averaged ones. Values go from the files straight
    into the networks: they are in memory once, and nothing beside them but the layers that LoRA changed.

    Raises:
        RunError: the checkpoint is of another network.
    """
    networks = _as_trained(directory, recipe, average)
    if recipe.train.trainable != "lora":
        return networks
    with torch.device("meta"):
        merged = method_class(recipe).fresh_networks(recipe)
    for part, network in networks.items():
        merged[part].load_state_dict(merge_lora(network.state_dict(), recipe.train), assign=True)
    return merged


def _as_trained(directory: Path, recipe: Recipe, average: Mixture | None = None) -> dict[str, nn.Module]:
    networks = method_class(recipe).fresh_networks(recipe)  # buffers hold formulas, which training may have rounded
    learnt: dict[str, Tensor] = {}
    with Shares(directory / STATE) as stored:
        for part, network in networks.items():
            if recipe.train.trainable == "lora":
                add_lora(network, recipe.train)
            for name, parameter in network.named_parameters():
                name, values = f"{part}.{name}", parameter.detach().view(-1)
                if average is not None and stored.has(power_average(recipe.train.posthoc_ema[0]), name):
                    learnt[name] = values.zero_()
                    continue
                # What is frozen has no average.
                key = EMA if recipe.train.ema_decay and stored.has(EMA, name) else WEIGHT
                stored.read(key, name, parameter.shape, values)
    if average is not None:
        average.add_to(learnt)
    return networks


def from_published(name: str, location: str, output: str, recipe: Recipe, scale: str = MORE_MOTION) -> str:
    """Write published weights as a bundle, or, those that are a base to train from, as a folder for ``train.init``.

    Args:
        name: of the weights, among `cinemo.methods.published_sources`.
        recipe: what their files do not say.
        scale: of their motion ids (`cinemo.media.motion.MotionScale`); ``pipelines/probe_motion.py`` measures it.

    Raises:
        InputError: a file is missing, or the weights do not fit the network.
    """
    source, target = published_sources()[name], _target(output)
    if not source.whole and target.is_dir() and any(target.iterdir()):
        raise InputError(f"{output}: is not empty; choose another --output")
    if name not in method_class(recipe).published:
        raise InputError(f"recipe {recipe.name} is of method {recipe.method}, which has no weights named {name}")
    imported = source.load(location, recipe)
    recipe = parse_recipe(imported.recipe.model_dump(mode="json"), location)
    if not source.whole:
        (network,) = imported.networks.values()
        save_network(network, target)
        return f"weights of one network; train with --recipe {recipe.name} --set train.init={output}"
    digest = save_bundle(target, recipe, imported.networks, imported.provenance, scale)
    ids = "" if method_class(recipe).controls_type.motion is None else f", motion ids taken as {scale}"
    return f"bundle {digest[:12]} of published weights ({recipe.name}){ids}"


def _target(output: str) -> Path:
    if storage.is_remote(output):
        raise InputError(f"output {output}: expected a local directory; upload it afterwards")
    return storage.local_path(output)
