"""The training loop on one rank (Cinemo, arXiv 2407.15642, Algorithm 1): batches in, weights moved, reports out.

Knows neither Ray nor where anything is stored: what happens with a report, at a checkpoint and at a sample sheet is
handed in. Every rank runs the same loop and makes the same calls in the same order.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from cinemo.config import Recipe
from cinemo.data.loading.loader import StepBatch
from cinemo.training.plan.search import too_large
from cinemo.training.report.metrics import Losses, Report, Window
from cinemo.training.run.batch import FrozenStates, HostBatch, host_batch, on_device
from cinemo.training.run.engine import Engine
from cinemo.training.run.notice import Agreement, Wish
from cinemo.training.run.profiler import DATA, FORWARD, span
from cinemo.types import RunError

DEPTH = 2
AHEAD = DEPTH + 1  # batches that may have been made beyond those that were trained on
T = TypeVar("T")
Weighted = tuple[HostBatch, Tensor]  # a micro batch and the weights of its samples (B,)


def train(
    recipe: Recipe,
    engine: Engine,
    batches: Iterable[StepBatch],
    frozen: FrozenStates,
    start_step: int = 0,
    on_report: Callable[[Report], None] = lambda report: None,
    on_checkpoint: Callable[[int], None] = lambda step: None,
    on_sheet: Callable[[int], None] = lambda step: None,
    validate: Callable[[], Losses] | None = None,
    sample_seconds: float = math.nan,
    on_step: Callable[[int], None] = lambda step: None,
    agreement: Agreement | None = None,
) -> Wish:
    """Train from ``start_step`` to ``recipe.train.max_steps``.

    Returns:
        `Wish.NOTHING` at the end; `Wish.LEAVE` or `Wish.STOP` where the ranks agreed on that earlier, after the
        checkpoint.

    Args:
        batches: this rank's samples of ``start_step``, ``start_step + 1``, ... (they may go on for ever). A step
            without samples, which is one on every rank, is passed over.
        on_report: called every ``log_every`` steps, before a checkpoint and at the end. Only then the loop waits for
            the device.
        on_checkpoint: called with the number of steps done, every ``checkpoint_every`` steps, at the end, and where
            the ranks agree to.
        on_sheet: the same for sample sheets, every ``sample_every`` steps and at the end.
        validate: measures the losses on held-out shards, every ``validate_every`` steps and at the end; they become
            part of that step's report.
        sample_seconds: see `cinemo.training.report.metrics.Window`.
        on_step: called with the number of steps done after each of them; its time is in no report.
        agreement: whether a step is followed by a checkpoint for other reasons, and by nothing more.

    Raises:
        RunError: too many steps in a row have no finite gradient (they and their samples are named), the data ended
            early, or a step does not fit the accelerator.
    """
    settings = recipe.train
    window = Window(engine, recipe, sample_seconds)
    missing = settings.on_damaged == "skip" or bool(settings.skip_samples)
    engine.method.train()
    with closing(prefetch(_prepare(batches, recipe, pin=engine.device.type == "cuda"))) as ready:
        for step in range(start_step, settings.max_steps):
            asked = time.perf_counter()
            with span(DATA):
                got = next(ready, None)
            if got is None or got[0] != step:
                raise RunError(f"data: expected the batch of step {step}, got {'none' if got is None else got[0]}")
            window.waited += time.perf_counter() - asked
            lr = engine.lr
            # Where samples are left out, the mean is over the samples that are there, on all ranks together.
            share = _share(engine, settings.global_batch, got[1]) if got[1] and missing else 1.0
            for number, (micro, weights_B) in enumerate(got[1], 1):
                if agreement is not None and number == len(got[1]):
                    agreement.begin()
                there_B = weights_B.to(engine.device, non_blocking=True)
                try:
                    with span(FORWARD):
                        losses_B = engine.loss(*on_device(micro, frozen, engine.device, engine.dtype))
                    engine.step((losses_B * there_B.to(losses_B.dtype)).mean() / share)
                except torch.OutOfMemoryError:
                    raise RunError(f"step {step + 1}: {too_large(settings)}") from None
                window.add(losses_B, micro, weights_B)
            done = step + 1
            window.end_step(done, moved=engine.moved or not got[1])
            begun = time.perf_counter()
            on_step(done)
            window.leave_out(time.perf_counter() - begun)

            wish = Wish.NOTHING if agreement is None else agreement.end()
            ends = wish >= Wish.LEAVE and done < settings.max_steps
            checkpoint = wish >= Wish.SAVE or _due(done, settings.checkpoint_every, settings.max_steps)
            sheet = not ends and _due(done, settings.sample_every, settings.max_steps)
            validation = validate is not None and _due(done, settings.validate_every, settings.max_steps)
            if checkpoint or sheet or validation or done % settings.log_every == 0:
                report = window.close(done, lr)
                if validate is not None and validation:
                    engine.method.eval()
                    report = report.validated(validate())
                    engine.method.train()
                on_report(report)
            if checkpoint:
                on_checkpoint(done)
            if ends:
                return wish
            if sheet:
                engine.method.eval()
                on_sheet(done)
                engine.method.train()
            if checkpoint or sheet or validation:
                window.restart()
    return Wish.NOTHING


def _due(done: int, every: int, last: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) and at the end happens after ``done`` steps."""
    return done == last or (every > 0 and done % every == 0)


def prefetch(items: Iterator[T], depth: int = DEPTH) -> Generator[T, None, None]:
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
    size = recipe.train.setting.micro_batch
    for batch in batches:
        samples, turns = batch.samples, [epoch - batch.epoch for epoch in batch.epochs or []]
        starts = range(0, len(samples), size)
        micros = [host_batch(samples[i : i + size], batch.step, recipe, turns[i : i + size]) for i in starts]
        weights = torch.split(torch.tensor(batch.weights or [1.0] * len(batch.samples)), size) if samples else ()
        if pin:
            micros, weights = [micro.pin() for micro in micros], tuple(part.pin_memory() for part in weights)
        yield batch.step, list(zip(micros, weights, strict=True))


def _share(engine: Engine, global_batch: int, micros: list[Weighted]) -> Tensor:
    """How much of the global batch is there. Where nothing is, all weights are 0 and any share will do."""
    there = torch.cat([weights_B.to(engine.device, non_blocking=True) for _, weights_B in micros])
    return engine.mean(there.mean()).clamp(min=1 / global_batch)
