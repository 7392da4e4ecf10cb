"""The tiny image encoder: a CLIP image model that learns what frames show, and where.

Its class token learns with CLIP's symmetric contrastive loss (arXiv 2103.00020) against the shipped text model, which
stays as it is; every patch's token also says what the patch looks like, so that tokens tell where something is. What
compares with the text, and what draws patches, is thrown away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from cinemo.media.synthetic import CLIP_FRAMES, render_scene
from cinemo.networks.frozen import ImageEncoder, TextEncoder
from cinemo.types import keyed_generator, keyed_seed

SIDE, PATCH, WIDTH = 64, 8, 64
FRAME = (64, 96)  # as the recipe has it; the model sees it squeezed into its square
DRAWN = 4  # pixels of a patch's side that its token is to say
BATCH, TEMPERATURE = 96, 0.07

Log = Callable[[str], None]


@dataclass(frozen=True)
class Frames:
    """``pixels_NCHW``: as the image model takes them. ``states_ND``: mean text states of their captions."""

    pixels_NCHW: Tensor
    states_ND: Tensor

    @classmethod
    def rendered(cls, count: int, seed: int, text: TextEncoder) -> Frames:
        """One frame of each of ``count`` scenes."""
        scenes = [render_scene(seed, index, FRAME) for index in range(count)]
        times = torch.randint(CLIP_FRAMES, (count,), generator=keyed_generator(seed, "frame")).tolist()
        frames = [scene.draw(time) for scene, time in zip(scenes, times, strict=True)]
        captions = [scene.caption for scene in scenes]
        states = [text.encode(captions[start : start + 64]).mean(1) for start in range(0, count, 64)]
        return cls(torch.stack([prepared(frame) for frame in frames]), torch.cat(states))


def prepared(frame_HWC: np.ndarray) -> Tensor:
    """As `ImageEncoder.prepare` with the model's square."""
    return ImageEncoder.square(frame_HWC, SIDE)


def train_image(
    minutes: float, seed: int, text: TextEncoder, log: Log, count: int = 6000
) -> tuple[CLIPVisionModel, float]:
    """Train within ``minutes`` after rendering; returns the model and its held-out top-1 of 64 retrieval."""
    train = Frames.rendered(count, keyed_seed(seed, "image train"), text)
    held_out = Frames.rendered(512, keyed_seed(seed, "image held out"), text)
    torch.manual_seed(keyed_seed(seed, "image"))
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        )
    )
    of_image, of_text = nn.Linear(WIDTH, 64), nn.Linear(train.states_ND.shape[1], 64)
    drawn = nn.Linear(WIDTH, 3 * DRAWN**2)
    learning = [*model.parameters(), *of_image.parameters(), *of_text.parameters(), *drawn.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.02)
    generator, started, step = keyed_generator(seed, "image", "batches"), time.monotonic(), 0

    def similarities(frames: Frames, picked: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BLD = model(frames.pixels_NCHW[picked]).last_hidden_state
        images, texts = of_image(tokens_BLD[:, 0]), of_text(frames.states_ND[picked])
        return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T / TEMPERATURE, tokens_BLD[:, 1:]

    def retrieval() -> float:
        with torch.no_grad():
            rows = torch.split(torch.arange(512), 64)
            right = [
                (similarities(held_out, row)[0].argmax(1) == torch.arange(64)).float().mean().item() for row in rows
            ]
        return sum(right) / len(right)

    while (spent := (time.monotonic() - started) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * spent))
        picked = torch.randint(count, (BATCH,), generator=generator)
        logits, patches_BLD = similarities(train, picked)
        target = torch.arange(BATCH)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        looks = F.mse_loss(drawn(patches_BLD), _patches(train.pixels_NCHW[picked]))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(contrast + looks)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            log(f"image: step {step}, contrast {contrast.item():.3f}, patches {looks.item():.4f}, {retrieval():.3f}")
    model.eval()
    score = retrieval()
    log(f"image: step {step}, held-out top-1 of 64 {score:.3f} (chance {1 / 64:.3f})")
    return model, score


def _patches(pixels_BCHW: Tensor) -> Tensor:
    """What each patch shows, small: (B, L, 3 x `DRAWN`^2), row by row."""
    small = F.avg_pool2d(pixels_BCHW, PATCH // DRAWN)
    return F.unfold(small, DRAWN, stride=DRAWN).transpose(1, 2)
