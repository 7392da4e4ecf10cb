"""What the bytes of a sample depend on: the fingerprint of a recipe, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cinemo.config import Recipe
from cinemo.data.dataset.shards import SCHEMA_VERSION
from cinemo.media.motion import ssim_parameters
from cinemo.media.scores import SCORES_VERSION
from cinemo.networks.frozen import check_vae, network_digest, vae_scaling

# Raise it when the same recipe no longer gives the same sample bytes.
SAMPLE_VERSION = 2  # 2: swscale into planes, up to one level brighter or darker than version 1
RESIZE = "cover, swscale area with full chroma, centre crop"
SHAPE_RULE = "nearest aspect ratio, then most frames that the clip has, then largest without enlarging"
INTERVAL_POLICY = "interval uniform over those that fit the clip, start uniform over those that fit the interval"


def encoder_dtype(recipe: Recipe) -> str:
    """The published code encodes in half precision on its GPU; CPUs have no fast half."""
    return "float16" if recipe.data.encode_gpus > 0 else "float32"


def fingerprint(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """A digest of everything that decides a sample's bytes, and what it covers.

    Left out: bucket edges (derived from the stored SSIM when a sample is read), everything about training, how the work
    is cut up, and fields beside the latents, which have fingerprints of their own
    (`cinemo.data.dataset.fields.identity`).

    Raises:
        InputError: ``encoders.vae`` is no autoencoder.
    """
    data, vae = recipe.data, recipe.encoders.vae
    check_vae(vae)
    scale, shift = vae_scaling(vae)
    covers: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "sample_version": SAMPLE_VERSION,
        "frames": data.frames,
        "size": list(data.size),
        "frame_interval": list(data.frame_interval),
        "interval_policy": INTERVAL_POLICY,
        "views": data.views,
        "seed": data.seed,
        "decoder": data.decoder,
        "resize": RESIZE,
        **{f"ssim_{name}": value for name, value in ssim_parameters(data.ssim).items()},
        "vae": network_digest(vae),
        "vae_scaling": scale,
        "vae_shift": shift,
        "latent": recipe.encoders.latent,
        "dtype": encoder_dtype(recipe),
    }
    # Left out where there are none: datasets from before keep their fingerprints.
    if data.scores:
        covers["scores"] = SCORES_VERSION
    if data.other_shapes:
        covers |= {"other_shapes": [list(shape) for shape in data.other_shapes], "shape_rule": SHAPE_RULE}
    return digest(covers), covers


def as_begun(covers: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a fingerprint covers, with the version of the scores that a dataset was begun with: one that is finished
    keeps its own, and only new shards would mix two.
    """
    both = "scores" in covers and "scores" in stored
    return {**covers, **({"scores": stored["scores"]} if both else {})}


def digest(covers: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON values by name."""
    return hashlib.sha256(json.dumps(covers, sort_keys=True).encode()).hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One ``name is THERE there and HERE here`` entry for each field that differs."""
    return [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
