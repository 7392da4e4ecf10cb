"""The shipped tiny encoders are good enough to be shipped, and the code that made them does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

import cinemo
from cinemo.media.synthetic import render_clip
from cinemo.types import InputError
from tools.tiny_encoders import linear_start
from tools.tiny_encoders import vae as tiny_vae
from tools.tiny_encoders.card import SIZE, clip_licences
from tools.tiny_encoders.frames import BlockPCA, FrameSets, clip_files, gather, psnr
from tools.tiny_encoders.leaves import dead_leaves
from tools.tiny_encoders.text import MAX_TOKENS, rendered_pairs, train_text

ASSETS = Path(cinemo.__file__).parent / "assets" / "tiny"
HELD_OUT = ("bottle_static.mp4", "dog.mp4", "flower_vp8.webm", "people_walking_1080p.mp4")


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(ASSETS / "vae", low_cpu_mem_usage=False).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")


@pytest.fixture(scope="module")
def text() -> Any:
    return CLIPTextModel.from_pretrained(ASSETS / "text_encoder").eval()


@pytest.fixture(scope="module")
def real_frames(real_clips: Path) -> FrameSets:
    return gather(real_clips, HELD_OUT, SIZE, seed=7, frames_per_clip=6, crops_per_frame=12, rendered_share=0.2)


def rendered(seed: int, count: int) -> np.ndarray:
    return np.concatenate([render_clip(seed, index, SIZE, frames=2).frames_FHWC for index in range(count)])


def test_shipped_vae_beats_block_pca_on_real_clips_it_never_saw(vae: Any, real_frames: FrameSets) -> None:
    linear = BlockPCA(real_frames.train_NHWC)
    margins = {}
    for name, frames_FHWC in real_frames.held_out.items():
        true = frames_FHWC[::4]
        margins[name] = psnr(tiny_vae.reconstruct(vae, true), true) - psnr(linear.reconstruct(true), true)
    assert set(margins) == set(HELD_OUT)
    assert np.mean(list(margins.values())) >= 2, margins


def test_shipped_vae_keeps_up_with_a_pca_made_for_rendered_frames(vae: Any) -> None:
    """Rendered frames are smooth and nearly Gaussian, where a linear codec fitted to them is the best there is.

    What the VAE leaves, at 42 dB against 44, nobody sees.
    """
    linear, true = BlockPCA(rendered(11, 60)), rendered(12, 18)
    made = psnr(tiny_vae.reconstruct(vae, true), true)
    assert made > 40
    assert made > psnr(linear.reconstruct(true), true) - 2.5


def test_every_channel_of_the_latents_has_about_unit_deviation(vae: Any, real_frames: FrameSets) -> None:
    """On real and rendered frames in equal parts, which is what its statistics were measured on."""
    real = real_frames.train_NHWC[:: len(real_frames.train_NHWC) // 200][:200]
    _, deviation = tiny_vae.latent_statistics(vae, np.concatenate([real, rendered(16, 100)]))
    normal = np.array(deviation) / vae.config.latents_std
    assert vae.config.scaling_factor == 1
    assert normal.min() > 0.6
    assert normal.max() < 1.6
    assert np.median(normal) == pytest.approx(1, abs=0.2)


def test_a_shifted_picture_has_shifted_latents(vae: Any) -> None:
    """By a cell: the latents inside are the same ones, one further."""
    frames_NHWC = rendered(17, 8)
    pixels = torch.from_numpy(frames_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        here, there = (vae.encode(x).latent_dist.mode() for x in (pixels, pixels.roll((8, 8), (2, 3))))
    inside, moved = here[:, :, 2:-3, 2:-3], there[:, :, 3:-2, 3:-2]
    assert float((moved - inside).square().mean() / inside.square().mean()) < 0.02


@pytest.mark.parametrize("size", [(40, 72), (128, 192)])
def test_shipped_vae_takes_other_multiples_of_eight(vae: Any, size: tuple[int, int]) -> None:
    true = render_clip(13, 0, size, frames=1).frames_FHWC
    made = tiny_vae.reconstruct(vae, true)
    assert made.shape == true.shape
    assert psnr(made, true) > 24


def test_assets_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    base = sum(size for path, size in sizes.items() if ASSETS / "unet" in path.parents)
    assert base <= 8e6
    assert sum(sizes.values()) - base <= 8e6


def test_card_names_every_held_out_clip() -> None:
    card = (ASSETS / "CARD.md").read_text()
    assert all(f"| {name} |" in card for name in HELD_OUT)


@pytest.mark.parametrize("words", ["a red ball moves slowly to the left over green hills", "fireworks über 東京 🙂 42"])
def test_tokenizer_gives_words_back(tokenizer: Any, words: str) -> None:
    ids = tokenizer(words).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # CLIP's tokenizer sets digits apart.
    assert tokenizer.decode(ids, skip_special_tokens=True).replace("4 2", "42") == words


def test_tokenizer_cuts_and_pads_to_the_text_model(tokenizer: Any, text: Any) -> None:
    assert tokenizer.model_max_length == text.config.max_position_embeddings == MAX_TOKENS
    for words in ("", "a dog " * 100):
        ids = tokenizer(words, padding="max_length", truncation=True).input_ids
        assert len(ids) == MAX_TOKENS
        assert tokenizer.eos_token_id in ids


def test_pooled_text_is_the_state_at_the_first_end_token(tokenizer: Any, text: Any) -> None:
    ids = tokenizer("a blue star", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        made = text(ids)
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    torch.testing.assert_close(made.pooler_output[0], made.last_hidden_state[0, end])


@torch.no_grad()
def test_text_model_tells_opposite_directions_apart_but_not_verbs(tokenizer: Any, text: Any) -> None:
    """Rendered motion decides the direction, never the verb; an untrained model weighs both words alike."""

    def embed(thing: str, verb: str, way: str, scene: str) -> torch.Tensor:
        words = f"a {thing} {verb} quickly {way} over {scene}"
        ids = tokenizer(words, padding="max_length", return_tensors="pt").input_ids
        return torch.nn.functional.normalize(text(ids).pooler_output[0], dim=0)

    by_way, by_verb = [], []
    for thing in ("red ball", "blue star"):
        for scene in ("green hills", "fresh snow"):
            for way, opposite in (("to the left", "to the right"), ("up", "down")):
                here = embed(thing, "moves", way, scene)
                by_way.append(1 - float(here @ embed(thing, "moves", opposite, scene)))
                by_verb.append(1 - float(here @ embed(thing, "glides", way, scene)))
    assert all(way > verb for way, verb in zip(by_way, by_verb, strict=True)), (by_way, by_verb)
    assert np.mean(by_way) > 3 * np.mean(by_verb)


def test_block_pca_is_exact_on_blocks_of_low_rank() -> None:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(6, 192)) * 6
    blocks = 128 + rng.normal(size=(400, 6)) @ basis
    images = np.clip(blocks, 0, 255).reshape(100, 2, 2, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(100, 16, 16, 3)
    true = np.round(images).astype(np.uint8)
    assert psnr(BlockPCA(true, 16).reconstruct(true), true) > 45
    assert psnr(BlockPCA(true, 2).reconstruct(true), true) < 35


@pytest.mark.slow
def test_linear_start_is_a_codec_before_any_training() -> None:
    torch.manual_seed(0)
    frames_NHWC = rendered(14, 12)
    images = torch.from_numpy(frames_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = AutoencoderKL(**tiny_vae.ARCHITECTURE)
    untrained = psnr(tiny_vae.reconstruct(vae, frames_NHWC[:8]), frames_NHWC[:8])
    coarse = linear_start.coarse_basis(images)
    linear_start.write_core(vae, coarse, images)
    linear_start.write_fine(vae, coarse, images)
    # The encoder's first levels and the 4x4 analysis are the same map.
    hidden = vae.encoder.conv_in(images[:2])
    for level in vae.encoder.down_blocks[:2]:
        hidden = level(hidden)
    torch.testing.assert_close(hidden, coarse.encode(images[:2]), rtol=1e-3, atol=1e-3)
    assert psnr(tiny_vae.reconstruct(vae, frames_NHWC[:8]), frames_NHWC[:8]) > untrained + 8


@pytest.mark.slow
def test_training_ends_within_its_budget_and_sets_the_scale() -> None:
    frames_NHWC = rendered(15, 20)
    lines: list[str] = []
    vae = tiny_vae.train_vae(
        FrameSets(frames_NHWC, {"x": frames_NHWC[:4]}, (), frames_NHWC[10:]), 0.05, 0, None, lines.append
    )
    assert sum(" done" in line for line in lines) == len(tiny_vae.STAGES)
    mean, deviation = tiny_vae.latent_statistics(vae, frames_NHWC)
    assert (vae.config.latents_mean, vae.config.latents_std) == (mean, deviation)


def test_dead_leaves_follow_their_seed_and_hold_their_colours() -> None:
    palette_NC = np.array([[200, 30, 30], [30, 200, 30]])
    first, second, other = (dead_leaves(np.random.default_rng(seed), palette_NC, (96, 144)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert first[..., 2].mean() < min(first[..., 0].mean(), first[..., 1].mean())


def test_text_training_reads_the_rendered_captions() -> None:
    pairs = rendered_pairs(12, 3)
    assert pairs.views_NCHW.shape == (12, 12, 32, 48)
    assert len(pairs.captions) == 12
    tokenizer, text, score = train_text(0.01, 3, lambda line: None, pairs=32)
    assert text.config.eos_token_id == tokenizer.eos_token_id
    assert 0 <= score <= 1


def test_held_out_clips_are_kept_apart_and_must_exist(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.webm", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "CLIPS.md").write_text("| set | name | repo | license |\n|--|--|--|--|\n| public | a.mp4 | r | CC0 |\n")
    train, held_out = clip_files(tmp_path, ["b.webm"])
    assert ([path.name for path in train], [path.name for path in held_out]) == (["a.mp4"], ["b.webm"])
    assert clip_licences(tmp_path) == {"a.mp4": "CC0"}
    with pytest.raises(InputError, match=r"c\.mp4: no such video"):
        clip_files(tmp_path, ["c.mp4"])
    with pytest.raises(InputError, match="no video left"):
        clip_files(tmp_path, ["a.mp4", "b.webm"])
