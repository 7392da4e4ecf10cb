"""What a training passes over because it was asked to: steps (``train.skip_steps``) or samples (``skip_samples``).

The order of all other samples stays as it is, and the sample log shows what is missing. So a run that met a poisoned
batch goes on from a checkpoint before it, without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cinemo.config import TrainConfig
from cinemo.data.loading.loader import StepBatch
from cinemo.data.loading.mix import MixedLoader
from cinemo.types import LatentSample


@dataclass(frozen=True)
class LeftOut:
    """``steps``: as reports count them, from 1. ``samples``: their ids, as the sample log has them."""

    steps: tuple[range, ...]
    samples: frozenset[str]

    @classmethod
    def of(cls, train: TrainConfig) -> LeftOut:
        return cls(tuple(map(steps_of, train.skip_steps)), frozenset(train.skip_samples))

    def passes(self, step: int) -> bool:
        """Whether global step ``step``, counted from 0, is passed over."""
        return any(step + 1 in some for some in self.steps)

    def seen(self, step: int, keys: Sequence[str]) -> list[str]:
        """Of the samples of global step ``step``, counted from 0, those that are trained on."""
        return [] if self.passes(step) else [key for key in keys if key not in self.samples]

    def batch(self, loader: MixedLoader, step: int) -> StepBatch:
        """The loader's batch of a step: without samples where the step is passed over, else with weight 0, and without
        a content, for each that is left out.
        """
        if self.passes(step):
            return StepBatch(step, loader.epoch(step), [])
        batch = loader.batch(step)
        if self.samples.isdisjoint(sample.key for sample in batch.samples):
            return batch
        weights = batch.weights or [1.0] * len(batch.samples)
        there = [sample.key not in self.samples for sample in batch.samples]
        samples = [sample if seen else _emptied(sample) for sample, seen in zip(batch.samples, there, strict=True)]
        return replace(batch, samples=samples, weights=[w * seen for w, seen in zip(weights, there, strict=True)])


NOTHING = LeftOut((), frozenset())


def steps_of(text: str) -> range:
    """``1203`` or ``1203-1210``, both included."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _emptied(sample: LatentSample) -> LatentSample:
    """A sample of the same shape without anything that is no number: a weight of 0 does not undo an infinite loss."""
    fields = {
        name: np.zeros_like(value) if isinstance(value, np.ndarray) else value for name, value in sample.fields.items()
    }
    return sample.changed(latents_FCHW=np.zeros_like(sample.latents_FCHW), fields=fields)
