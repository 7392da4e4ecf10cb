"""Figures of one video from embeddings of its frames: how alike neighbours are, and how close to words or a picture."""

from __future__ import annotations

import numpy as np

from cinemo.types import InputError


def cosines(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """(N,) cosine of each row with its counterpart; ``b`` may be one row, (D,)."""
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_ND, np.float64)
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def frame_consistency(frames_FD: np.ndarray, first: int | None = None, all_pairs: bool = False) -> float:
    """F-Consistency of TRIP (arXiv 2403.17005, section 4.1): mean cosine of CLIP embeddings, times 100.

    Args:
        first: of the first frames alone (4: the paper's F-Consistency_4); None is all of them.
        all_pairs: of all pairs of frames; else of neighbours. The paper does not say which, but all its methods have
            less over the first 4 frames than over all, which pairs far apart would make unlikely.
    """
    frames = np.asarray(frames_FD, np.float64)[:first]
    if len(frames) < 2:
        raise InputError(f"frame consistency of {len(frames)} frame embeddings, expected at least 2")
    if not all_pairs:
        return 100 * float(cosines(frames[:-1], frames[1:]).mean())
    units = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    products = units @ units.T
    return 100 * float(products[np.triu_indices(len(frames), 1)].mean())


def temporal_consistency(frames_FD: np.ndarray) -> float:
    """Tem-Cons (arXiv 2405.17306, section 4.1): mean cosine of neighbouring frames' CLIP embeddings, -1 to 1."""
    return frame_consistency(frames_FD) / 100


def clip_similarity(frames_FD: np.ndarray, text_D: np.ndarray) -> float:
    """CLIPSIM (arXiv 2104.14806): mean cosine of frames' embeddings with that of the prompt, -1 to 1."""
    return float(cosines(frames_FD, text_D).mean())


def perceptual_input_conformity(distances_F: np.ndarray) -> float:
    """PIC (arXiv 2310.12190, section 4.2): mean of 1 - DreamSim distance of every frame to the given picture."""
    return float((1 - np.asarray(distances_F, np.float64)).mean())
