"""The frozen networks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cinemo.config.part import Part


class EncodersConfig(Part):
    """Frozen networks. A location is ``package:NAME`` (shipped with cinemo), a directory, or ``s3://``."""

    vae: str = "package:tiny/vae"
    vae_decoder: str | None = Field(None, description="another VAE for decoding, e.g. SVD's temporal decoder")
    text_encoder: str = "package:tiny/text_encoder"
    tokenizer: str = "package:tiny/tokenizer"
    image_encoder: str | None = Field(None, description="CLIP's image model, for methods and fields that need it")
    flow: str | None = Field(
        None, description="weights of torchvision's RAFT, large or small, for the field flow; null: OpenCV's DIS"
    )
    latent: Literal["sample", "mode"] = Field(
        "sample", description="the published code draws a sample from the posterior"
    )
    normalize: bool = Field(
        False,
        description="train on channels of mean 0 and deviation 1, as precompute measured them on the dataset; "
        "false: with the autoencoder's own scaling, as published",
    )
    latents_mean: tuple[float, ...] | None = Field(
        None,
        description="mean of each stored channel; with normalize, train.py takes it and latents_std from the dataset",
    )
    latents_std: tuple[float, ...] | None = Field(None, description="deviation of each stored channel")

    @model_validator(mode="after")
    def _check(self) -> EncodersConfig:
        mean, deviation = self.latents_mean, self.latents_std
        if (mean is None) != (deviation is None) or len(mean or ()) != len(deviation or ()):
            raise ValueError("latents_mean and latents_std: expected both, one number for each latent channel")
        if min(deviation or (1.0,)) <= 0:
            raise ValueError(f"latents_std is {deviation}, expected numbers above 0")
        return self

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, deviation) of each stored latent channel where training normalises by them."""
        if not self.normalize or self.latents_mean is None or self.latents_std is None:
            return None
        return self.latents_mean, self.latents_std
