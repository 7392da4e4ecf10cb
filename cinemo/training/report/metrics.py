"""What a training says of itself: losses of single samples, gathered without waiting for the device, and the report.

The loss of a diffusion model hides what it is made of: early and late timesteps differ by an order of magnitude, and a
network may learn to stand still while large motions stay wrong. So every loss is also a mean by quartile of timesteps
and by motion bucket.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinemo.config import MOTION_BUCKETS, Recipe
from cinemo.training.run.batch import HostBatch
from cinemo.training.run.engine import Engine
from cinemo.types import RunError

QUARTILES = 4
_GROUPS = 1 + QUARTILES + MOTION_BUCKETS  # overall, by quartile, by bucket
NAN = math.nan
_SHOWN = 16


@dataclass(frozen=True)
class Losses:
    """Mean losses of some samples: all, by quartile of timesteps (nan where none fell), by motion bucket (those seen).

    Quartile 0 is the least noisy quarter of the schedule's steps.
    """

    overall: float
    quartiles: tuple[float, ...]
    buckets: Mapping[int, float]

    @classmethod
    def of_sums(cls, losses: list[float], weights: list[float]) -> Losses:
        """From the two rows of `LossSums.sums`."""
        means = [loss / weight if weight else NAN for loss, weight in zip(losses, weights, strict=True)]
        buckets = dict(enumerate(means[1 + QUARTILES : _GROUPS]))
        return cls(means[0], tuple(means[1 : 1 + QUARTILES]), {k: v for k, v in buckets.items() if not math.isnan(v)})


@dataclass(frozen=True)
class Report:
    """The mean over ranks and over the steps since the last report.

    ``step``: optimiser steps done. ``lr``, ``grad_norm`` (before clipping): of the last step, the norm of
    the last one that moved weights.
    ``samples_per_second``: of all ranks together. ``data_wait``: share of the time spent waiting for data.
    ``mfu``: FLOPs that the network's mathematics needs, as a share of what the devices could have done in that time
    (model FLOPs utilisation, arXiv 2204.02311, appendix B). ``memory_gb``: the most that any rank has held so far:
    allocated on an accelerator, resident on a CPU; 1e9 bytes. ``loss_t0`` .. ``loss_t3``: by quartile of timesteps.
    ``val_*``: on held-out shards, in the reports in which it was measured. nan stands for what is not known.
    ``skipped``: samples that this group of workers left out because their shard is damaged (``train.on_damaged``).
    ``skipped_steps``: how many of the steps moved no weights because their gradient was not finite; their losses are
    not in the means. ``unmoved``: those steps, and the samples whose loss is not finite, or all where every loss is.
    ``buckets``: the loss by motion bucket, as ``loss_bucket_07`` and ``val_loss_bucket_07``; only those that were seen.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    data_wait: float
    mfu: float = NAN
    memory_gb: float = NAN
    loss_t0: float = NAN
    loss_t1: float = NAN
    loss_t2: float = NAN
    loss_t3: float = NAN
    val_loss: float = NAN
    val_loss_t0: float = NAN
    val_loss_t1: float = NAN
    val_loss_t2: float = NAN
    val_loss_t3: float = NAN
    skipped: float = NAN
    skipped_steps: float = NAN
    unmoved: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    buckets: Mapping[str, float] = field(default_factory=dict)

    def kept(self) -> list[float | None]:
        """The values of `COLUMNS`, None for nan: what a checkpoint holds of every report."""
        values = [getattr(self, name) for name in COLUMNS]
        return [value if math.isfinite(value) else None for value in values]

    @classmethod
    def of_kept(cls, values: Sequence[float | None]) -> Report:
        """The report of `kept`, or of the first of these values (what checkpoints of earlier versions hold)."""
        known = dict(zip(COLUMNS, values, strict=False))
        return cls(**{name: NAN if value is None else value for name, value in known.items()})  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """All known values but the step, by name."""
        values = dict(zip(COLUMNS[1:], self.kept()[1:], strict=True)) | dict(self.buckets)
        return {name: value for name, value in values.items() if value is not None}

    def validated(self, losses: Losses) -> Report:
        """The same report with the losses on held-out shards."""
        buckets = dict(self.buckets) | _by_bucket("val_loss", losses)
        return replace(self, val_loss=losses.overall, buckets=buckets, **_by_quartile("val_loss", losses))


COLUMNS = tuple(entry.name for entry in fields(Report) if entry.name not in ("buckets", "unmoved"))


class LossSums:
    """Losses of single samples with what they are sorted by, kept on their device until they are asked for."""

    def __init__(self, train_steps: int) -> None:
        self._train_steps = train_steps
        self._parts: list[tuple[Tensor, Tensor, Tensor, int, Tensor | None]] = []

    def add(self, losses_B: Tensor, batch: HostBatch, step: int = 0, weight_B: Tensor | None = None) -> None:
        """Keep the losses of one micro batch.

        Args:
            losses_B: (B,), on any device; it is not waited for.
            batch: in host memory; of it the timesteps and motion buckets.
            step: how many steps lie between this one and the first that was added.
            weight_B: (B,), host memory; 0 counts as not there, None is 1 for each.
        """
        self._parts.append((losses_B.detach(), batch.t_B, batch.bucket_B, step, weight_B))

    def sums(self, device: torch.device, steps: int = 1, without: Sequence[int] = ()) -> Tensor:
        """(2, 25 + steps) float64: weighted losses, and weights: overall, by quartile, by bucket, by step.

        Args:
            without: steps that do not count, as `add` has them.
        """
        if not self._parts:
            return torch.zeros(2, _GROUPS + steps, dtype=torch.float64, device=device)
        losses, t, buckets, offsets, given = zip(*self._parts, strict=True)
        weights = [
            torch.ones(len(t_B)) if weight_B is None else weight_B for t_B, weight_B in zip(t, given, strict=True)
        ]
        step_N = torch.tensor(offsets).repeat_interleave(torch.tensor([len(t_B) for t_B in t]))
        quartile_N = torch.cat(t) * QUARTILES // self._train_steps
        groups_GN = torch.stack(
            [
                torch.zeros_like(step_N),
                1 + quartile_N,
                1 + QUARTILES + torch.cat(buckets).long(),
                _GROUPS + step_N,
            ]
        ).to(device)
        weights_N = (
            torch.cat(weights)
            .where(~torch.isin(step_N, torch.tensor(without, dtype=torch.long)), 0.0)
            .to(device, torch.float64)
        )
        losses_N = torch.cat(losses).to(device, torch.float64)
        losses_N = torch.where(weights_N > 0, losses_N * weights_N, 0.0)  # what is not there may be no number
        found = torch.zeros(2, _GROUPS + steps, dtype=torch.float64, device=device)
        for groups_N in groups_GN:
            found[0].index_add_(0, groups_N, losses_N)
            found[1].index_add_(0, groups_N, weights_N)
        return found


class Window:
    """What is gathered between two reports.

    Args:
        sample_seconds: how long one device would take for one sample's training if it reached its peak, for the MFU.
    """

    def __init__(self, engine: Engine, recipe: Recipe, sample_seconds: float = NAN) -> None:
        self._engine, self._sample_seconds = engine, sample_seconds
        self._global_batch, self._train_steps = recipe.train.global_batch, recipe.diffusion.train_steps
        self._in_a_row: list[_Part] = []
        self._most_in_a_row = recipe.train.max_skipped_steps
        self.restart()

    def restart(self) -> None:
        self._losses, self._steps = LossSums(self._train_steps), 0
        self._unmoved: dict[int, _Part] = {}
        self._current = _Part(0)
        self.waited, self._begun = 0.0, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Some of the time since `restart` was not training."""
        self._begun += seconds

    def add(self, losses_B: Tensor, batch: HostBatch, weight_B: Tensor | None = None) -> None:
        """A micro batch of the current step, see `LossSums.add`."""
        self._losses.add(losses_B, batch, self._steps, weight_B)
        self._current.keys.append(batch.keys)
        self._current.losses.append(losses_B.detach())

    def end_step(self, done: int, moved: bool) -> None:
        """Step ``done``, counted from 1, is over; ``moved``: whether its gradient was finite, the same on all ranks.

        Raises:
            RunError: it is the last of ``train.max_skipped_steps`` in a row whose gradient was not.
        """
        part, self._current = replace(self._current, step=done), _Part(0)
        self._steps += 1
        if moved:
            self._in_a_row = []
            return
        self._unmoved[self._steps - 1] = part
        self._in_a_row.append(part)
        if len(self._in_a_row) >= self._most_in_a_row:
            raise RunError(_stopped(_blamed(self._engine, self._in_a_row)))

    def close(self, done: int, lr: float) -> Report:
        """The report of the steps since `restart`, of which ``done`` is the last; waits for the device. Then restarts.

        Raises:
            RunError: the loss of a step that moved the weights is not finite.
        """
        engine, steps = self._engine, self._steps
        sums = self._losses.sums(engine.device, steps, [*self._unmoved])
        _wait_for(engine.device)
        seconds = time.perf_counter() - self._begun
        # One exchange for everything: means of the sums, and a place for each rank's memory, of which the most counts.
        own = [0.0] * engine.world
        own[engine.rank] = peak_memory(engine.device)
        rest = torch.tensor([self.waited / seconds, *own], dtype=torch.float64, device=engine.device)
        found = engine.mean(torch.cat([sums.flatten(), rest])).tolist()
        width = sums.shape[1]
        losses, weights, (waited, *memory) = found[:width], found[width : 2 * width], found[2 * width :]
        for offset, (loss, weight) in enumerate(zip(losses[_GROUPS:], weights[_GROUPS:], strict=True)):
            if not math.isfinite(loss):
                raise RunError(
                    f"step {done - steps + offset + 1}: the loss is {loss / weight}; "
                    "resume from an earlier checkpoint with a lower train.lr"
                )
        mean = Losses.of_sums(losses, weights)
        speed = steps * self._global_batch / seconds
        mfu = speed / engine.world * self._sample_seconds
        report = Report(
            done,
            mean.overall,
            lr,
            engine.grad_norm,
            speed,
            waited,
            mfu if mfu <= 1 else NAN,  # else a CPU's peak was measured beside other work, and is more
            max(memory) * engine.world / 1e9,
            skipped_steps=len(self._unmoved),
            unmoved=_blamed(engine, [*self._unmoved.values()]),
            buckets=_by_bucket("loss", mean),
            **_by_quartile("loss", mean),
        )
        self.restart()
        return report


@dataclass(frozen=True)
class _Part:
    """This rank's samples of a step, and their losses on its device, by micro batch."""

    step: int
    keys: list[tuple[str, ...]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


def _blamed(engine: Engine, steps: Sequence[_Part]) -> dict[int, tuple[str, ...]]:
    """By step, the samples of all ranks whose loss is not finite; all samples where every loss is. Every rank calls."""
    if not steps:
        return {}
    own = [
        [(key, finite) for key, finite in zip(itertools.chain(*part.keys), _finite(part.losses), strict=True)]
        for part in steps
    ]
    ranks = engine.gather(own)
    found = {}
    for number, part in enumerate(steps):
        samples = [sample for rank in ranks for sample in rank[number]]
        found[part.step] = tuple(key for key, finite in samples if not finite) or tuple(key for key, _ in samples)
    return found


def _finite(losses: Sequence[Tensor]) -> list[bool]:
    return [bool(one) for one in torch.cat([*losses]).isfinite().tolist()]


def _stopped(blamed: Mapping[int, tuple[str, ...]]) -> str:
    steps = span(blamed)
    return (
        f"steps {steps}: the gradient is not finite in {len(blamed)} steps in a row (train.max_skipped_steps); samples "
        f"{names_of(dict.fromkeys(itertools.chain(*blamed.values())))}; resume from a checkpoint before them with "
        f"--skip-steps {steps}, or with a lower train.lr"
    )


def span(steps: Iterable[int]) -> str:
    """Consecutive steps as ``--skip-steps`` takes them."""
    first, last = min(steps), max(steps)
    return f"{first}-{last}" if last > first else str(first)


def names_of(samples: Collection[str]) -> str:
    """The ids of some samples in a line, the first of them where there are many."""
    more = len(samples) - _SHOWN
    return ", ".join(itertools.islice(samples, _SHOWN)) + (f" and {more} more" if more > 0 else "")


def _by_quartile(name: str, losses: Losses) -> dict[str, Any]:
    return {f"{name}_t{quartile}": value for quartile, value in enumerate(losses.quartiles)}


def _by_bucket(name: str, losses: Losses) -> dict[str, float]:
    return {f"{name}_bucket_{bucket:02d}": value for bucket, value in losses.buckets.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most bytes this process has held: allocated on an accelerator, resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:  # getrusage would also count what the process was before it became this program
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
