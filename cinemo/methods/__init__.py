"""The methods: each paper's mathematics in one readable file, and how a recipe becomes one of them."""

from __future__ import annotations

from cinemo.config import Recipe
from cinemo.diffusion.schedule import noise_schedule
from cinemo.methods.base import MotionMethod
from cinemo.methods.cinemo import CinemoMethod
from cinemo.methods.trainable import check_trainable, mark_trainable
from cinemo.networks.lavie_unet import LavieUNet

__all__ = ["CinemoMethod", "MotionMethod", "build_method", "check_trainable", "mark_trainable"]


def build_method(recipe: Recipe, unet: LavieUNet | None = None) -> CinemoMethod:
    """The method of a recipe, around ``unet`` or a freshly initialised one (global torch RNG)."""
    if unet is None:
        unet = LavieUNet(**recipe.model.model_dump())
    return CinemoMethod(unet, noise_schedule(recipe.diffusion), recipe.sample, recipe.train.min_snr_gamma)
