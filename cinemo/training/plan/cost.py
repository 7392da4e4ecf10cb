"""What a sample costs in floating-point operations: for plans and for the MFU.

FLOPs are counted from shapes, nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from cinemo.config import Recipe, Shape
from cinemo.data.dataset.shards import DatasetIndex, pixels
from cinemo.methods import build_method, mark_trainable
from cinemo.training.run.batch import blank_condition, blank_example, latent_shape
from cinemo.types import LatentBatch


@dataclass(frozen=True)
class SampleFlops:
    """FLOPs of one sample; a multiplication and an addition are two. Matrix products, convolutions and attention count.

    ``forward``: one pass. ``training``: forward and backward, which is twice the forward pass, less where weights are
    frozen: what the MFU is made of.
    """

    forward: int
    training: int


def training_flops(recipe: Recipe, indexes: Sequence[DatasetIndex]) -> float:
    """FLOPs of training on one sample, in the mean over the shapes of some datasets' samples."""
    counts: Counter[Shape] = Counter()
    for index in indexes if recipe.data.other_shapes else ():
        for shape in index.latent_shapes:
            counts[pixels(shape)] += int(index.of_shape(shape).samples_of_shards.sum())
    if not counts:
        return float(sample_flops(recipe).training)
    costs = {shape: sample_flops(recipe.of_shape(shape)).training for shape in counts}
    return sum(costs[shape] * count for shape, count in counts.items()) / counts.total()


def sample_flops(recipe: Recipe) -> SampleFlops:
    """FLOPs of one training sample of a recipe. Takes seconds for the full-size network, with frozen weights twenty."""
    frames, channels, rows, columns = latent_shape(recipe)
    example = blank_example(recipe)
    with torch.device("meta"):
        method = build_method(recipe)
        mark_trainable(method, recipe.train)
        video_BCFHW = torch.empty(1, channels, frames, rows, columns)
        condition = blank_condition(recipe, example, video_BCFHW, torch.float32)
        batch = LatentBatch(video_BCFHW, condition)
        t_B, noise = torch.empty(1, dtype=torch.long), torch.empty_like(method.target(batch))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            method(batch, t_B, noise)
        forward = training = int(counter.get_total_flops())
        if recipe.train.trainable == "all":
            training *= 3
        else:
            with FlopCounterMode(display=False) as counter:
                torch.autograd.backward(method(batch, t_B, noise))
            training = int(counter.get_total_flops())
    return SampleFlops(forward, training)
