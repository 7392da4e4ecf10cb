"""A recipe of DynamiCrafter whose networks are random and take moments."""

from __future__ import annotations

import pytest
from tiny import FRAMES, IMAGE_TOKENS, SIZE, WIDTH, save_encoders, save_image_encoder

from cinemo.config import DataConfig, DiffusionConfig, EncodersConfig
from cinemo.methods.dynamicrafter import DynamiCrafterModel, DynamiCrafterRecipe, DynamiCrafterSample
from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig
from cinemo.networks.resampler import ResamplerConfig


@pytest.fixture(scope="module")
def dynamicrafter_recipe(tmp_path_factory: pytest.TempPathFactory) -> DynamiCrafterRecipe:
    encoders = tmp_path_factory.mktemp("encoders")
    save_encoders(encoders)
    save_image_encoder(encoders / "image_encoder")
    places = {name: str(encoders / name) for name in ("vae", "text_encoder", "tokenizer", "image_encoder")}
    return DynamiCrafterRecipe(
        name="random-32x48",
        data=DataConfig(size=SIZE, frames=FRAMES, frame_interval=(1, 6)),
        encoders=EncodersConfig(**places),
        model=DynamiCrafterModel(
            unet=DynamiCrafterConfig(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(1, 2),
                num_head_channels=16,
                context_dim=WIDTH,
            ),
            resampler=ResamplerConfig(
                dim=32, depth=1, dim_head=8, heads=2, num_queries=3, embedding_dim=WIDTH, output_dim=WIDTH,
                video_length=FRAMES,
            ),
            text_layers=1,
            image_tokens=IMAGE_TOKENS,
        ),
        diffusion=DiffusionConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        sample=DynamiCrafterSample(steps=3, guidance_scale=3.0, eta=0.0),
    )  # fmt: skip
