"""Training crops and held-out frames for the tiny encoders, and the linear codec they are compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from cinemo.media.synthetic import render_clip
from cinemo.media.video import probe, read_frames
from cinemo.types import InputError, keyed_seed
from tools.tiny_encoders.leaves import dead_leaves

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov")
BLOCK = 8


@dataclass(frozen=True)
class FrameSets:
    """``train_NHWC``: uint8 crops. ``held_out``: whole frames, uint8 FHWC, of clips that training never sees.

    ``leaves_NHWC``: crops of dead-leaves images, in the colours of the training crops; may be empty.
    """

    train_NHWC: np.ndarray
    held_out: dict[str, np.ndarray]
    train_names: tuple[str, ...]
    leaves_NHWC: np.ndarray


def clip_files(directory: Path, hold_out: Collection[str]) -> tuple[list[Path], list[Path]]:
    """The videos directly inside ``directory`` as (training, held out); ``hold_out`` are file names.

    Raises:
        InputError: a held-out name that is not there, or nothing left to train on.
    """
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    missing = sorted(set(hold_out) - {path.name for path in files})
    if missing:
        raise InputError(f"--hold-out {missing[0]}: no such video in {directory}; it has {[p.name for p in files]}")
    train = [path for path in files if path.name not in hold_out]
    if not train:
        raise InputError(f"{directory}: no video left to train on; hold out fewer than all {len(files)}")
    return train, [path for path in files if path.name in hold_out]


def gather(
    clips: Path | None,
    hold_out: Collection[str],
    size: tuple[int, int],
    seed: int,
    frames_per_clip: int = 240,
    crops_per_frame: int = 24,
    rendered_share: float = 0.18,
    leaf_images: int = 0,
) -> FrameSets:
    """Crops of every training clip at random scales, a share of rendered frames, and the held-out frames.

    Args:
        leaf_images: dead-leaves images to paint, ten crops each.
    """
    train, held_out = clip_files(clips, hold_out) if clips else ([], [])
    crops: list[np.ndarray] = []
    for path in train:
        rng = np.random.default_rng(keyed_seed(seed, "crops", path.name))
        for frame_HWC in _spread(path, frames_per_clip):
            crops += [_crop(frame_HWC, size, rng) for _ in range(crops_per_frame)]
    rendered = round(len(crops) * rendered_share / (1 - rendered_share)) if crops else 8000
    rng = np.random.default_rng(keyed_seed(seed, "crops", "rendered"))
    for index in range(-(-rendered // 4)):
        clip = render_clip(seed, index, (2 * size[0], 2 * size[1]), frames=4)
        crops += [_crop(frame_HWC, size, rng) for frame_HWC in clip.frames_FHWC]
    evaluated = {path.name: held_out_frames(path, size) for path in held_out}
    train_NHWC = np.stack(crops)
    return FrameSets(train_NHWC, evaluated, tuple(path.name for path in train), _leaves(train_NHWC, leaf_images, seed))


def _leaves(train_NHWC: np.ndarray, images: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(keyed_seed(seed, "crops", "leaves"))
    size = (train_NHWC.shape[1], train_NHWC.shape[2])
    palette_NC = train_NHWC[:: max(1, len(train_NHWC) // 400)].reshape(-1, 3)
    crops = []
    for _ in range(images):
        any_colours = rng.integers(0, 256, (500, 3))
        painted = dead_leaves(rng, palette_NC if rng.random() < 0.7 else any_colours)
        crops += [_crop(painted, size, rng) for _ in range(10)]
    return np.stack(crops) if crops else train_NHWC[:0]


def held_out_frames(path: Path, size: tuple[int, int], count: int = 24) -> np.ndarray:
    """``count`` frames spread over the clip, covered and centre-cropped to ``size`` as the product does."""
    return read_frames(path, np.linspace(0, probe(path).frames - 1, count).astype(int).tolist(), size)


def _spread(path: Path, count: int) -> Iterator[np.ndarray]:
    """``count`` frames spread over the clip at their stored size, read in portions that fit into memory."""
    total = probe(path).frames
    indices = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    for start in range(0, len(indices), 60):
        yield from read_frames(path, indices[start : start + 60])


def _crop(frame_HWC: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random window between a fifth of the frame and all of it, scaled down by one of three antialiased filters."""
    height, width = frame_HWC.shape[:2]
    whole = min(height / size[0], width / size[1])
    tightest = min(1.0, max(1.0 / whole, 0.22))
    share = 1.0 if rng.random() < 0.25 else float(np.exp(rng.uniform(np.log(tightest), 0)))
    stretch = float(np.exp(rng.uniform(-0.12, 0.12))) if share < 0.9 else 1.0
    rows, columns = min(height, whole * share * size[0] * stretch), min(width, whole * share * size[1] / stretch)
    top, left = rng.uniform(0, height - rows), rng.uniform(0, width - columns)
    if rng.random() < 0.5:
        window = frame_HWC[int(top) : int(top) + max(1, int(rows)), int(left) : int(left) + max(1, int(columns))]
        return np.asarray(cv2.resize(window, size[::-1], interpolation=cv2.INTER_AREA))
    kind = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[int(rng.integers(2))]
    box = (left, top, left + columns, top + rows)
    return np.asarray(Image.fromarray(frame_HWC).resize(size[::-1], kind, box=box))


def psnr(made_FHWC: np.ndarray, true_FHWC: np.ndarray) -> float:
    """Mean over frames of the peak signal-to-noise ratio of uint8 frames, in dB."""
    error = (made_FHWC.astype(np.float64) - true_FHWC) ** 2
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error.mean((1, 2, 3)), 1e-9))))


class BlockPCA:
    """The linear codec of the same latent size: PCA of 8x8 RGB blocks (Karhunen-Loeve)."""

    def __init__(self, train_NHWC: np.ndarray, components: int = 16) -> None:
        blocks = _blocks(train_NHWC)
        self.mean = blocks.mean(0)
        self.basis = np.linalg.eigh(np.cov((blocks - self.mean).T))[1][:, -components:]

    def reconstruct(self, frames_FHWC: np.ndarray) -> np.ndarray:
        blocks = (_blocks(frames_FHWC) - self.mean) @ self.basis @ self.basis.T + self.mean
        count, height, width, _ = frames_FHWC.shape
        grid = blocks.reshape(count, height // BLOCK, width // BLOCK, BLOCK, BLOCK, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.asarray(np.clip(np.round(grid.reshape(frames_FHWC.shape)), 0, 255), np.uint8)


def _blocks(frames_NHWC: np.ndarray) -> np.ndarray:
    count, height, width, _ = frames_NHWC.shape
    grid = frames_NHWC.reshape(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, BLOCK * BLOCK * 3).astype(np.float64)
