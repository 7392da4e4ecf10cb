"""Part of `make bench-serve`: what the batching engine costs beside the model, and what sharing a batch saves.

Process CPU time of one thread, so that figures hold on a machine with other work; best of several interleaved repeats.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, load_bundle, save_bundle
from cinemo.networks.weights import load_unet
from cinemo.recipes import load_recipe
from cinemo.serving.engine.sampling import SamplingEngine

TINY = load_recipe("cinemo-tiny")
STEPS, REPEATS = 10, 5


def sampling_engine_part() -> Iterator[tuple[str, str, str]]:
    """(what, figure, unit): the engine against `animate` for one job, and batches against one job at a time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        unet = load_unet(TINY.model, str(TINY.train.init), torch.float32)
        save_bundle(Path(scratch) / "bundle", TINY, {"unet": unet}, {})
        bundle = load_bundle(Path(scratch) / "bundle", "cpu")
        picture = np.random.default_rng(0).integers(0, 256, (*TINY.data.size, 3), dtype=np.uint8)
        requests = [AnimateRequest(picture, "a ball rolls", seed=k, steps=STEPS) for k in range(8)]
        works: dict[str, Callable[[], None]] = {
            "animate": lambda: _alone(bundle, requests[:4]),
            "one at a time": lambda: _together(bundle, requests[:4], 1),
            "two": lambda: _together(bundle, requests[:4], 2),
            "four": lambda: _together(bundle, requests[:4], 4),
            "four of eight": lambda: _together(bundle, requests, 4),
        }
        best = dict.fromkeys(works, float("inf"))
        for repeat in range(REPEATS + 1):
            for name, work in works.items():
                begun = time.process_time()
                work()
                if repeat:  # the first warms up
                    best[name] = min(best[name], time.process_time() - begun)
    best["four of eight"] /= 2
    alone = best["animate"]
    yield "`animate`, a job of 10 steps", f"{alone / 4:.3f}", "s"
    yield "the engine with one place, against it", f"{100 * (best['one at a time'] / alone - 1):+.1f}", "%"
    for name in ("two", "four", "four of eight"):
        yield (
            f"videos/s with {name} in a batch, against one at a time",
            f"{best['one at a time'] / best[name]:.2f}",
            "x",
        )


def _alone(bundle: ModelBundle, requests: list[AnimateRequest]) -> None:
    for request in requests:
        animate(bundle, request)


def _together(bundle: ModelBundle, requests: list[AnimateRequest], max_batch: int) -> None:
    engine, waiting, finished = SamplingEngine(bundle, max_batch), list(enumerate(requests)), 0
    while waiting or len(engine):
        # With one place the next job comes when the last is done; else all take turns.
        while waiting and (max_batch > 1 or not len(engine)):
            number, request = waiting.pop(0)
            engine.join(str(number), request)
        finished += len(engine.step().finished)
    assert finished == len(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    for name, figure, unit in sampling_engine_part():
        print(f"| {name} | {figure} {unit} |", flush=True)


if __name__ == "__main__":
    main()
