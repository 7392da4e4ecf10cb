"""Makes the tiny encoders from first frame to last figure, and writes the card that goes with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL

from tools.tiny_encoders.frames import BlockPCA, FrameSets, gather, psnr
from tools.tiny_encoders.text import train_text
from tools.tiny_encoders.vae import ARCHITECTURE, LEAF_SHARE, STAGES, reconstruct, train_vae

SIZE = (64, 96)
LEAF_IMAGES = 2800

Log = Callable[[str], None]


def make_tiny_encoders(
    output: Path, clips: Path | None, hold_out: Sequence[str], minutes: float, text_minutes: float, seed: int, log: Log
) -> Path:
    """Train both encoders and write ``vae/``, ``text_encoder/``, ``tokenizer/`` and ``CARD.md`` under ``output``.

    Returns:
        The card's path.
    """
    began = time.monotonic()
    frames = gather(clips, hold_out, SIZE, seed, leaf_images=LEAF_IMAGES)
    log(f"{len(frames.train_NHWC)} training crops from {len(frames.train_names)} clips and rendered ones")
    vae = train_vae(frames, minutes, seed, output / "checkpoints", log)
    vae.half().save_pretrained(output / "vae")
    tokenizer, text, retrieval = train_text(text_minutes, seed, log)
    tokenizer.save_pretrained(output / "tokenizer")
    text.save_pretrained(output / "text_encoder")
    # Read back, so that the card's figures are those of the files.
    shipped = AutoencoderKL.from_pretrained(output / "vae", low_cpu_mem_usage=False)
    licences = clip_licences(clips) if clips else {}
    command = f"python tools/make_tiny_encoders.py --clips CLIPS --minutes {minutes:g} --seed {seed}"
    command += "".join(f" --hold-out {name}" for name in hold_out) + " --output DIR"
    card = output / "CARD.md"
    card.write_text(
        card_text(
            shipped, frames, retrieval, licences, command, (time.monotonic() - began) / 60, (minutes, text_minutes)
        )
    )
    log(f"{card}: written")
    return card


def psnr_rows(vae: AutoencoderKL, frames: FrameSets) -> list[tuple[str, float, float]]:
    """(held-out clip, PSNR of the VAE, PSNR of block PCA fitted on the training crops), in dB."""
    linear = BlockPCA(frames.train_NHWC[::10], vae.config.latent_channels)
    return [
        (name, psnr(reconstruct(vae, true), true), psnr(linear.reconstruct(true), true))
        for name, true in frames.held_out.items()
    ]


def clip_licences(clips: Path) -> dict[str, str]:
    """File name to licence, from the table of ``CLIPS.md`` beside the clips (empty without one)."""
    table = clips / "CLIPS.md"
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in (table.read_text().splitlines() if table.exists() else [])
        if line.startswith("|")
    ]
    return {row[1]: row[3] for row in rows[2:] if len(row) > 3}


def card_text(
    vae: AutoencoderKL,
    frames: FrameSets,
    retrieval: float,
    licences: dict[str, str],
    command: str,
    wall_minutes: float,
    budgets: tuple[float, float],
) -> str:
    rows = psnr_rows(vae, frames)
    table = [f"| {name} | {ours:.2f} | {pca:.2f} | {ours - pca:+.2f} |" for name, ours, pca in rows]
    if rows:
        ours, pca = (float(np.mean([row[column] for row in rows])) for column in (1, 2))
        table.append(f"| mean | {ours:.2f} | {pca:.2f} | {ours - pca:+.2f} |")

    def named(name: str) -> str:
        return f"- `{name}`: {licences.get(name, 'licence not stated')}"

    parameters = sum(parameter.numel() for parameter in vae.parameters())
    stages = ", ".join(f"{name} {share:.0%}" for name, (share, *_) in STAGES.items())
    return "\n".join(
        [
            "# Tiny encoders",
            "",
            "A VAE and a text model small enough to ship and to run on a CPU; the `cinemo-tiny` recipe uses them.",
            "They are for demonstrations and tests, not for quality.",
            "",
            "## Made with",
            "",
            f"`{command}`",
            "",
            f"Wall time {wall_minutes:.0f} minutes on two shared CPU cores: {budgets[0]:g} for the VAE ({stages}), "
            f"{budgets[1]:g} for the text model, the rest for frames. The schedule follows the clock, so another run "
            "gives other weights of the same kind.",
            "",
            f"Trained on {len(frames.train_NHWC)} crops of {SIZE[0]}x{SIZE[1]} pixels: about four fifths from these "
            "clips, the others from rendered clips (`cinemo/media/synthetic.py`); in the last stage "
            f"{LEAF_SHARE:.0%} of a batch are {len(frames.leaves_NHWC)} crops of dead-leaves images "
            "(`tools/tiny_encoders/leaves.py`). Licences as `CLIPS.md` states them:",
            "",
            *map(named, frames.train_names),
            "",
            "Held out, never seen in training:",
            "",
            *map(named, frames.held_out),
            "",
            "## VAE",
            "",
            f"diffusers `AutoencoderKL`, widths {tuple(ARCHITECTURE['block_out_channels'])}, 8x down, "
            f"{vae.config.latent_channels} latent channels, {parameters / 1e6:.2f} M parameters, stored as float16. "
            f"Squared error and a KL weight of 1e-5; no perceptual or adversarial loss. Training starts from a linear "
            "codec in closed form. Mean and deviation of every channel, measured on training crops, are in its "
            "configuration (`latents_mean`, `latents_std`): latents are normalised by them.",
            "",
            f"PSNR in dB over 24 whole frames per clip at {SIZE[0]}x{SIZE[1]}, mean latent, against PCA of 8x8 blocks "
            "with 16 components fitted on the same training crops:",
            "",
            "| held-out clip | VAE | PCA | margin |",
            "|---|---|---|---|",
            *table,
            "",
            "## Text",
            "",
            "Byte-level BPE in CLIP's format and a `CLIPTextModel` (2 layers, 64 wide, 32 tokens), trained against "
            f"rendered motion with CLIP's loss. Held-out retrieval, top 1 of 64: {retrieval:.3f} (chance 0.016).",
            "",
            "## Limits",
            "",
            "- The VAE blurs fine texture and was measured at 64x96 only; other multiples of 8 work.",
            "- The text model knows the rendered captions: shapes, colours, scenes, directions, speeds. Other words "
            "have tokens but hardly any meaning.",
            "",
        ]
    )
