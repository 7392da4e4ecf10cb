"""The training loop on one rank (Cinemo, arXiv 2407.15642, Algorithm 1): batches in, weights moved, reports out.

Knows neither Ray nor where anything is stored: what happens with a report, at a checkpoint and at a sample sheet is
handed in. Every rank runs the same loop and makes the same calls in the same order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cinemo.config import Recipe
from cinemo.data.loader import StepBatch
from cinemo.training.batch import HostBatch, TextStates, host_batch, on_device
from cinemo.training.engine import Engine
from cinemo.types import RunError

T = TypeVar("T")
Weighted = tuple[HostBatch, Tensor]  # a micro batch and the weights of its samples (B,)


@dataclass(frozen=True)
class Report:
    """The mean over ranks and over the steps since the last report.

    ``step``: optimiser steps done. ``lr``, ``grad_norm`` (before clipping): of the last step.
    ``samples_per_second``: of all ranks together. ``data_wait``: share of the time spent waiting for data.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    data_wait: float


def train(
    recipe: Recipe,
    engine: Engine,
    batches: Iterable[StepBatch],
    text: TextStates,
    start_step: int = 0,
    on_report: Callable[[Report], None] = lambda report: None,
    on_checkpoint: Callable[[int], None] = lambda step: None,
    on_sheet: Callable[[int], None] = lambda step: None,
) -> None:
    """Train from ``start_step`` to ``recipe.train.max_steps``.

    Args:
        batches: this rank's samples of ``start_step``, ``start_step + 1``, ... (they may go on for ever).
        on_report: called every ``log_every`` steps, before a checkpoint and at the end. Only then the loop waits for
            the device.
        on_checkpoint: called with the number of steps done, every ``checkpoint_every`` steps and at the end.
        on_sheet: the same for sample sheets, every ``sample_every`` steps and at the end.

    Raises:
        RunError: the loss is not finite (the step is named), or the data ended early.
    """
    settings = recipe.train
    window = _Window(engine, settings.global_batch)
    engine.method.train()
    with closing(prefetch(_prepare(batches, recipe, pin=engine.device.type == "cuda"))) as ready:
        for step in range(start_step, settings.max_steps):
            asked = time.perf_counter()
            got = next(ready, None)
            if got is None or got[0] != step:
                raise RunError(f"data: expected the batch of step {step}, got {'none' if got is None else got[0]}")
            window.waited += time.perf_counter() - asked
            lr = engine.lr
            losses = []
            # Where damaged shards are left out, the mean is over the samples that are there, on all ranks together.
            share = _share(engine, settings.global_batch, got[1]) if settings.on_damaged == "skip" else 1.0
            for micro, weights_B in got[1]:
                losses_B = engine.loss(*on_device(micro, text, engine.device, engine.dtype))
                loss = (losses_B * weights_B.to(losses_B)).mean() / share
                engine.step(loss)
                losses.append(loss.detach().float())
            window.losses.append(torch.stack(losses).mean())

            done, last = step + 1, step + 1 == settings.max_steps
            checkpoint = last or done % settings.checkpoint_every == 0
            sheet = last or (settings.sample_every > 0 and done % settings.sample_every == 0)
            if checkpoint or sheet or done % settings.log_every == 0:
                on_report(window.close(done, lr))
            if checkpoint:
                on_checkpoint(done)
            if sheet:
                engine.method.eval()
                on_sheet(done)
                engine.method.train()
            if checkpoint or sheet:
                window.restart()


class _Window:
    """What is gathered between two reports, without waiting for the device."""

    def __init__(self, engine: Engine, global_batch: int) -> None:
        self._engine, self._global_batch = engine, global_batch
        self.restart()

    def restart(self) -> None:
        self.losses: list[Tensor] = []
        self.waited, self._begun = 0.0, time.perf_counter()

    def close(self, done: int, lr: float) -> Report:
        losses = self._engine.mean(torch.stack(self.losses)).tolist()
        seconds = time.perf_counter() - self._begun
        (waited,) = self._engine.mean(torch.tensor([self.waited / seconds], device=self._engine.device)).tolist()
        for offset, loss in enumerate(losses):
            if not abs(loss) < float("inf"):
                step = done - len(losses) + offset + 1
                raise RunError(
                    f"step {step}: the loss is {loss}; resume from an earlier checkpoint with a lower train.lr"
                )
        mean = sum(losses) / len(losses)
        speed = len(losses) * self._global_batch / seconds
        report = Report(done, mean, lr, self._engine.grad_norm, speed, waited)
        self.restart()
        return report


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items in the same order, made by a thread up to ``depth`` ahead; its exceptions are raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.2)
            except queue.Full:
                continue
            return

    def fill() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=fill, name="prefetch", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()


def _prepare(batches: Iterable[StepBatch], recipe: Recipe, pin: bool) -> Iterator[tuple[int, list[Weighted]]]:
    size = recipe.train.micro_batch
    for batch in batches:
        parts = [batch.samples[start : start + size] for start in range(0, len(batch.samples), size)]
        micros = [host_batch(part, batch.step, recipe) for part in parts]
        weights = torch.split(torch.tensor(batch.weights or [1.0] * len(batch.samples)), size)
        yield batch.step, list(zip([micro.pin() for micro in micros] if pin else micros, weights, strict=True))


def _share(engine: Engine, global_batch: int, micros: list[Weighted]) -> Tensor:
    """How much of the global batch is there. Where nothing is, all weights are 0 and any share will do."""
    there = torch.cat([weights_B for _, weights_B in micros]).mean().to(engine.device)
    return engine.mean(there).clamp(min=1 / global_batch)
