"""Does what is drawn happen? Arrows on rendered scenes that no training has seen, for methods that take them.

The prompt is empty, so that the arrow alone says where: flow of the video around its start (for a shape, where the
shape is) must go its way, and the more of it, the faster was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle
from cinemo.evaluation.calibration import levels, rank_correlation
from cinemo.media.arrows import SIGMA_AT_512
from cinemo.media.flow import dense_flow
from cinemo.media.synthetic import CLIP_FRAMES, Scene, render_scene
from cinemo.methods import controls_of, method_class
from cinemo.progress import doing
from cinemo.types import keyed_seed

KINDS = ("object", "pan", "flow")
SPEEDS = 4  # of those that the control has, from the second slowest to the fastest
LENGTH = 0.3  # of the shorter side: an arrow


def measure_drawn(bundle: ModelBundle, count: int, steps: int, seed: int) -> dict[str, Any]:
    """``drawn_cosine``, mean cosine of flow and arrow, and ``drawn_speed_rank``, rank correlation of the speed that is
    asked for and the flow along the arrow; each also by kind of scene. Empty where the method takes no arrows.

    Args:
        count: scenes of each of `KINDS`.
    """
    controls = method_class(bundle.recipe).controls_type
    name = next((info.name for info in controls_of(controls).values() if info.kind == "vectors"), None)
    speeds = controls.motion_values(bundle.recipe)
    if name is None or speeds is None:
        return {}
    control, values = speeds
    asked = levels(values[1:], SPEEDS)
    cosines: dict[str, list[float]] = {kind: [] for kind in KINDS}
    ranks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    scenes = [(kind, number) for kind in KINDS for number in range(count)]
    with doing("animating with arrows", len(scenes) * len(asked), "videos") as work:
        for kind, number in scenes:
            scene = render_scene(seed, number, bundle.recipe.data.size, kind=kind)
            arrow, where_HW = _arrow(scene, keyed_seed(seed, "arrow", kind, number), bundle.recipe.data.size)
            way = np.array([arrow[2] - arrow[0], arrow[3] - arrow[1]])
            way, along = way / np.hypot(*way), []
            for value in work.counting(asked):
                told: dict[str, Any] = {name: [arrow], control: value, "steps": steps, "seed": number}
                request = AnimateRequest(scene.draw(CLIP_FRAMES // 2), "", **told)
                mean = _mean_flow(animate(bundle, request).frames_FHWC, where_HW)
                along.append(float(mean @ way))
                cosines[kind].append(float(mean @ way / max(1e-9, np.linalg.norm(mean))))
            ranks[kind].append(rank_correlation(asked, along) or 0.0)
    figures = {f"drawn_cosine_{kind}": _mean(cosines[kind]) for kind in KINDS}
    figures |= {f"drawn_speed_rank_{kind}": _mean(ranks[kind]) for kind in KINDS}
    return figures | {
        "drawn_cosine": _mean([cosine for each in cosines.values() for cosine in each]),
        "drawn_speed_rank": _mean([rank for each in ranks.values() for rank in each]),
    }


def _arrow(scene: Scene, seed: int, size: tuple[int, int]) -> tuple[list[float], np.ndarray]:
    """An arrow in any direction, and where it acts (H, W), 0..1: on a shape, or around its start."""
    rng, (height, width) = np.random.default_rng(seed), size
    angle, way = rng.uniform(0, 2 * np.pi), LENGTH * min(size)
    rows, columns = np.mgrid[:height, :width]
    moving = scene.moving(CLIP_FRAMES // 2) > 0.5
    if scene.motion["kind"] == "object" and moving.any():
        where = moving.astype(np.float64)
        y, x = np.argwhere(moving).mean(0)
    else:
        x, y = rng.uniform(0.3, 0.7, 2) * (width, height)
        radius = SIGMA_AT_512 * min(size) / 512 / 2
        where = (np.hypot(columns - x, rows - y) <= radius).astype(np.float64)
    return [float(x), float(y), float(x + way * np.cos(angle)), float(y + way * np.sin(angle))], where


def _mean_flow(frames_FHWC: np.ndarray, where_HW: np.ndarray) -> np.ndarray:
    """(2,) pixels a frame, over all frames, where it was drawn."""
    flow_F2HW = dense_flow(frames_FHWC, where_HW.shape).astype(np.float64)
    return np.asarray((flow_F2HW * where_HW).sum((0, 2, 3)) / (where_HW.sum() * len(flow_F2HW)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
