"""A complete bundle of random networks that samples in well under a second, and a dataset of noise: for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from cinemo import storage
from cinemo.bundle import save_bundle
from cinemo.config import DataConfig, EncodersConfig, Recipe, TrainConfig
from cinemo.data.dataset.shards import commit, index_bytes
from cinemo.methods.cinemo import CinemoRecipe, CinemoSample
from cinemo.methods.longer import LongerModel, LongerRecipe, LongerSample, LongerTrain
from cinemo.networks.field_refiner import FieldRefiner, RefinerConfig
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig
from cinemo.networks.lora import add_lora, save_adapter
from cinemo.networks.motion_field import FieldUNet, FieldUNetConfig
from cinemo.types import LatentSample, Refusal

SIZE, FRAMES, WIDTH = (32, 48), 6, 32
IMAGE_TOKENS = 17  # of `save_image_encoder`


def tiny_recipe(encoders: Path) -> Recipe:
    return CinemoRecipe(
        name="random-32x48",
        data=DataConfig(size=SIZE, frames=FRAMES),
        encoders=EncodersConfig(
            vae=str(encoders / "vae"),
            text_encoder=str(encoders / "text_encoder"),
            tokenizer=str(encoders / "tokenizer"),
        ),
        model=UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=WIDTH,
            attention_head_dim=1,
            addition_time_embed_dim=32,
        ),
        sample=CinemoSample(steps=4, dct_keep=0.5, guidance_scale=2.0, motion_bucket=7, fps=8),
    )


def save_encoders(directory: Path) -> None:
    """A random VAE (8x smaller, 4 channels), a random CLIP text model and a byte-level tokenizer."""
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained(directory / "vae")
    text = CLIPTextConfig(
        vocab_size=600, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=598, eos_token_id=599, pad_token_id=599,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(directory / "text_encoder")
    save_tokenizer(directory / "tokenizer")


def save_image_encoder(directory: Path) -> None:
    """A random CLIP image model of 32x32 pixels in patches of 8."""
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(directory)


def save_tokenizer(directory: Path) -> None:
    """CLIP's byte-level alphabet without any merge: every letter is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)} | {"<|startoftext|>": 598, "<|endoftext|>": 599}
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def random_unet(recipe: Recipe) -> LavieUNet:
    """Random weights whose answer depends on everything: the layers that begin at zero are drawn as well."""
    torch.manual_seed(1)
    unet = LavieUNet(**recipe.model.model_dump())
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return unet


def tiny_bundle(directory: Path, compiled: bool | str = False) -> Path:
    """Write the bundle (and beside it the encoders it was made from); returns its directory."""
    save_encoders(directory / "encoders")
    recipe = tiny_recipe(directory / "encoders").model_copy(update={"compile": compiled})
    save_bundle(directory / "bundle", recipe, {"unet": random_unet(recipe)}, {"made": "by a test"})
    return directory / "bundle"


def longer_recipe(encoders: Path, **train: Any) -> LongerRecipe:
    places = {name: str(encoders / name) for name in ("vae", "text_encoder", "tokenizer")}
    return LongerRecipe(
        name="random-32x48",
        data=DataConfig(size=SIZE, frames=FRAMES, fields=("flow",)),
        encoders=EncodersConfig(**places),
        model=LongerModel(
            unet=FieldUNetConfig(
                block_out_channels=(32, 64),
                layers_per_block=1,
                norm_num_groups=8,
                cross_attention_dim=WIDTH,
                attention_head_dim=1,
                addition_time_embed_dim=32,
                field_widths=(8,),
                flow_scale=2.0,
            ),
            refiner=RefinerConfig(widths=(8, 16), critic_widths=(8,), scale=2.0),
            strength_factor=2.0,
        ),
        train=LongerTrain(**train),
        sample=LongerSample(steps=3, guidance_scale=2.0, motion_speed=200, fastest=1000),
    )


def tiny_longer_bundle(directory: Path) -> Path:
    """The same for a method whose motion is drawn."""
    save_encoders(directory / "encoders")
    recipe = longer_recipe(directory / "encoders")
    torch.manual_seed(1)
    unet = FieldUNet(**recipe.model.unet.model_dump())
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    networks = {"unet": unet, "refiner": FieldRefiner(**recipe.model.refiner.model_dump())}
    save_bundle(directory / "bundle", recipe, networks, {"made": "by a test"})
    return directory / "bundle"


def write_dataset(directory: Path, shape: tuple[int, ...], sizes: tuple[int, ...] = (3, 0, 4)) -> Path:
    """Shards of random latents with SSIM 0.33, 0.43, ...; the first also refuses a clip."""
    rng = np.random.default_rng(0)
    records, number = [], 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            latents = rng.normal(size=shape).astype(np.float16)
            key = f"clip-{number}"
            samples.append(LatentSample(key, key, "a.mp4", f"caption {number}", latents, 0.33 + 0.1 * number, 24, 3, 0))
            number += 1
        refusals = [Refusal("bad", "b.mp4", "open", "unreadable", "not <a> video")] if shard == 0 else []
        records.append(commit(str(directory), shard, samples, refusals, "f" * 16))
    (directory / "index.parquet").write_bytes(index_bytes(records))
    edges = [round(k / 20, 6) for k in range(1, 20)]
    info = {
        "schema": 1, "complete": True, "fingerprint": "f" * 16, "size": list(SIZE), "frames": shape[0],
        "bucket_edges": edges, "samples": number, "quarantined": 1,
    }  # fmt: skip
    storage.write_json(str(directory / "dataset.json"), info)
    return directory


def tiny_adapter(encoders: Path, directory: Path) -> None:
    """A LoRA adapter for the network of `tiny_bundle`, whose encoders lie in ``encoders``."""
    train, unet = TrainConfig(trainable="lora", lora_rank=2, lora_layers=("to_q",)), random_unet(tiny_recipe(encoders))
    add_lora(unet, train)
    save_adapter(unet.state_dict(), train, directory)
