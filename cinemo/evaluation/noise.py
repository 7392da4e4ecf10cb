"""What the initial noise does to a video: the methods' own ways to draw it, on the same pictures and seeds.

Figures of Cinemo's Figs. 3 and 5 (arXiv 2407.15642) as numbers: how abruptly the worst pair of frames changes, and how
far colours drift from the picture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle
from cinemo.evaluation.metrics.estimates import Estimate, mean_of
from cinemo.evaluation.metrics.frames import colour_drift, largest_jump, motion
from cinemo.progress import counted

FIGURES = {
    "largest_jump": "largest change between neighbouring frames, over their mean change (1 is even)",
    "colour_drift": "mean colour of the last frame against the first (levels of 255)",
    "motion": "motion (1 - mean SSIM of neighbouring frames)",
}


def compare_noise(
    bundle: ModelBundle,
    pictures: Sequence[tuple[str, np.ndarray, str]],
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """`FIGURES` of each of the method's ``noise_variants``, by name; empty where it has none.

    Args:
        pictures: (name, (H, W, 3) uint8, prompt); all variants animate them with the same seed.
    """
    found, variants = {}, bundle.method.noise_variants
    for name, values in counted("comparing initial noise", variants.items(), len(variants), "ways"):
        drawn = _with(bundle, values)
        figures: dict[str, dict[str, float]] = {figure: {} for figure in FIGURES}
        for key, picture_HWC, prompt in pictures:
            request = AnimateRequest(picture_HWC, prompt, steps=steps, seed=seed)
            frames_FHWC = animate(drawn, request).frames_FHWC
            for figure, value in _figures(frames_FHWC).items():
                figures[figure][key] = value
        found[name] = {figure: mean_of(values) for figure, values in figures.items()}
    return found


def _with(bundle: ModelBundle, values: Mapping[str, Any]) -> ModelBundle:
    """A bundle with other sampling defaults, around the same networks."""
    recipe = bundle.recipe.model_copy(update={"sample": bundle.recipe.sample.model_copy(update=dict(values))})
    return replace(bundle, recipe=recipe, method=type(bundle.method).of(recipe, bundle.method.networks))


def _figures(frames_FHWC: np.ndarray) -> dict[str, float]:
    return {
        "largest_jump": largest_jump(frames_FHWC),
        "colour_drift": colour_drift(frames_FHWC),
        "motion": motion(frames_FHWC),
    }
