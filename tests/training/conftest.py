"""A training small enough for seconds: 4x4 latents, a two-level UNet, random frozen encoders, a rendered dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cinemo import storage
from cinemo.config import DataConfig, Recipe
from cinemo.data.dataset import identity, shards
from cinemo.recipes import load_recipe
from cinemo.types import LatentSample, keyed_seed
from tests.training.jobs import Job

SMALL = [
    "data.size=[32,32]",
    "data.frames=4",
    "model.in_channels=4",
    "model.out_channels=4",
    "model.block_out_channels=[32,64]",
    "model.norm_num_groups=8",
    "model.attention_head_dim=1",
    "model.cross_attention_dim=32",
    "model.addition_time_embed_dim=32",
    "train.warmup_steps=0",
    "train.schedule=constant",
    "train.lr=2e-3",
    "train.log_every=1",
    "train.init=null",
]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Locations of a random VAE, text encoder and tokenizer, as `cinemo.config.EncodersConfig` names them."""
    import diffusers
    import transformers

    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=widths, latent_channels=4, norm_num_groups=4, **blocks)
    vae.save_pretrained(root / "vae")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    transformers.CLIPTextModel(config).save_pretrained(root / "text_encoder")
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "pad_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    return {name: str(root / name) for name in ("vae", "text_encoder", "tokenizer")}


@pytest.fixture(scope="session")
def small(encoders: dict[str, str]) -> Recipe:
    """cinemo-tiny made smaller still, for one worker, with the paper's draws."""
    places = [f"encoders.{name}={location}" for name, location in encoders.items()]
    paper = ["train.timestep_shift=1", "train.prompt_dropout=0.5", "diffusion.data_scale=1", "encoders.latent=sample"]
    paper.append(f"data.bucket_edges={list(DataConfig().bucket_edges)}")
    one = ["train.workers=1", "train.lanes=2", "train.global_batch=4", "train.micro_batch=2"]
    return load_recipe("cinemo-tiny", [*SMALL, *places, *paper, *one])


def sizes(directory: Path) -> dict[str, int]:
    """Relative name -> bytes of every file under a directory."""
    return {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}


def moving_samples(count: int, frames: int = 4, channels: int = 4, side: int = 4) -> list[LatentSample]:
    """Latents of a smooth picture that drifts at a speed of its own; captions repeat."""
    made = []
    for number in range(count):
        generator = np.random.default_rng(keyed_seed(7, number))
        start_CHW, drift_CHW = generator.normal(size=(2, channels, side, side))
        ramp_F = np.linspace(0, 0.2 + 0.2 * (number % 4), frames)[:, None, None, None]
        made.append(
            LatentSample(
                key=f"clip{number:03d}_0",
                clip_id=f"clip{number:03d}",
                uri=f"clip{number:03d}.mp4",
                caption=("a dog", "a red car", "waves")[number % 3],
                latents_FCHW=(start_CHW + ramp_F * drift_CHW).astype(np.float16),
                ssim=1.0 - 0.2 * (number % 4) - 0.1,
                fps=24.0,
                frame_interval=3,
                start_frame=0,
            )
        )
    return made


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, small: Recipe) -> str:
    """A finished dataset of 12 samples in 3 shards; their videos are gone."""
    root = str(tmp_path_factory.mktemp("dataset"))
    samples, (fingerprint, covers) = moving_samples(12), identity.fingerprint(small)
    records = [
        shards.commit(root, number, samples[4 * number : 4 * number + 4], [], fingerprint) for number in range(3)
    ]
    storage.write_bytes(storage.join(root, "index.parquet"), shards.index_bytes(records))
    info = {
        "schema": shards.SCHEMA_VERSION,
        "complete": True,
        "samples": 12,
        "quarantined": 0,
        "fingerprint": fingerprint,
        "computed_from": covers,
        "latent_shape": [4, 4, 4, 4],
    }
    storage.write_json(storage.join(root, "dataset.json"), info)
    return root


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A torch process group of one rank, as Ray Train would have made it."""
    if not torch.distributed.is_initialized():
        rendezvous: Path = tmp_path_factory.mktemp("group") / "file"
        torch.distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=0, world_size=1)


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Those that are appended are killed in the end."""
    started: list[Job] = []
    yield started
    for job in started:
        if job.process.poll() is None:
            job.kill_all()
