"""The loss on held-out shards: the same samples with the same noise at the same timesteps each time.

Fresh draws would move the mean more than a thousand training steps do. So every draw is keyed by its sample alone, and
timesteps are the middles of eight strata of the schedule, dealt out in turn: two measurements of one run, or of two
runs on one dataset, differ by their weights only. Nothing depends on the number of ranks but the order of summation.
It is the plain error, without min-SNR weights: runs with and without them compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cinemo.config import Recipe
from cinemo.data.loading.loader import HeldOut
from cinemo.training.report.metrics import Losses, LossSums
from cinemo.training.run.batch import FrozenStates, HostBatch, host_batch, on_device, undropped
from cinemo.training.run.engine import Engine
from cinemo.types import InputError, LatentSample, keyed_generator

STRATA = 8
LEAST, MOST = 64, 256  # forward passes of one sample each, where there are samples enough
_SEED = 0  # not the run's: runs of different seeds compare


@dataclass(frozen=True)
class Draw:
    """One forward pass: the ``number``-th held-out sample, its ``turn``-th time, at timestep ``t``."""

    number: int
    turn: int
    t: int


def plan_draws(samples: int, train_steps: int) -> list[Draw]:
    """What is measured of ``samples`` held-out samples: up to `MOST` of them, evenly spread over all; fewer than
    `LEAST` have further turns, each at another timestep (at most one in each stratum)."""
    chosen = [place * samples // MOST for place in range(MOST)] if samples > MOST else list(range(samples))
    turns = min(STRATA, -(-LEAST // len(chosen))) if chosen else 0
    return [
        Draw(number, turn, (2 * ((place + turn) % STRATA) + 1) * train_steps // (2 * STRATA))
        for turn in range(turns)
        for place, number in enumerate(chosen)
    ]


class Validation:
    """Measures the loss on held-out samples; every rank makes every call, and all run equally many forward passes.

    Args:
        frozen: of the training, so that captions seen there are not encoded again.
        held_out: read here, this rank's share of what `plan_draws` takes. A sample that is lost with its shard counts
            as not there.

    Raises:
        InputError: there are no held-out samples.
    """

    def __init__(self, recipe: Recipe, engine: Engine, frozen: FrozenStates, held_out: HeldOut) -> None:
        self._recipe = undropped(recipe)
        self._engine, self._frozen = engine, frozen
        draws = plan_draws(len(held_out), recipe.diffusion.train_steps)
        if not draws:
            raise InputError(
                f"train.held_out_shards is {recipe.train.held_out_shards}: these shards hold no samples; raise it, or "
                "set it to 0 to train without validation"
            )
        # All ranks must call the network equally often (ZeRO-3 gathers weights in it): the last ones repeat a draw
        # with weight zero.
        padded = -(-len(draws) // engine.world)
        places = range(engine.rank, padded * engine.world, engine.world)
        mine = [(draws[place % len(draws)], place < len(draws)) for place in places]
        numbers = sorted({draw.number for draw, _ in mine})
        samples, weights = held_out.read(numbers)
        read = dict(zip(numbers, zip(samples, weights or [1.0] * len(samples), strict=True), strict=True))
        self._mine = [(draw, read[draw.number][0], counts * read[draw.number][1]) for draw, counts in mine]

    def __call__(self) -> Losses:
        """The losses now. The network should be in evaluation mode."""
        # Samples of several shapes one by one: every rank calls the network as often as the others.
        engine, size = self._engine, 1 if self._recipe.data.other_shapes else self._recipe.train.setting.micro_batch
        found = LossSums(self._recipe.diffusion.train_steps)
        for start in range(0, len(self._mine), size):
            part = self._mine[start : start + size]
            batch = _batch([sample for _, sample, _ in part], [draw for draw, _, _ in part], self._recipe)
            with torch.no_grad():
                inputs = on_device(batch, self._frozen, engine.device, engine.dtype)
                losses_B = engine.method(*inputs, reduction="none", weighted=False)
            found.add(losses_B, batch, weight_B=torch.tensor([weight for _, _, weight in part]))
        losses, weights = engine.mean(found.sums(engine.device)).tolist()
        return Losses.of_sums(losses, weights)


def _batch(samples: Sequence[LatentSample], draws: Sequence[Draw], recipe: Recipe) -> HostBatch:
    batch = host_batch(samples, 0, recipe)
    noises = [
        torch.randn(batch.noise_BCFHW.shape[1:], generator=keyed_generator(_SEED, "validation", draw.turn, sample.key))
        for draw, sample in zip(draws, samples, strict=True)
    ]
    return replace(batch, t_B=torch.tensor([draw.t for draw in draws]), noise_BCFHW=torch.stack(noises))
