"""`make chaos-train`: training is killed over and over, at moments drawn from a seed, and must end as if undisturbed.

Each round trains in a fresh output. Its command is started again after every kill (SIGKILL) of a worker (the command
must survive that), the raylet or the GCS (the Ray node), the driver alone, or everything at once; half of the kills
wait for a checkpoint that is being written. Every second start has one worker instead of two. In the end the log of
samples must be that of an undisturbed training, and losses and weights must agree with it.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from chaos import Kill, disturb, draw, make_clips, run_and_kill

from cinemo.config import Recipe
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.training.checkpoint import checkpoints
from cinemo.training.checkpoint.export import consolidated
from cinemo.training.report import sample_log

ROOT = Path(__file__).resolve().parent.parent
# Sums of two workers and of one are in another order, which training then carries on.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-2


def recipe_of(workers: int, steps: int) -> Recipe:
    settings = ["data.frames=6", "data.frame_interval=[1,3]", "data.clips_per_shard=4", f"train.max_steps={steps}"]
    settings += [f"train.workers={workers}", "train.micro_batch=2", "train.checkpoint_every=4", "train.log_every=1"]
    return override(cinemo_tiny(), [*settings, "train.sample_every=0", "train.sample_count=1", "train.max_failures=8"])


def losses(output: Path) -> dict[int, float]:
    with (output / "loss.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def weights(output: Path) -> torch.Tensor:
    card = checkpoints.latest(str(output))
    assert card is not None
    unet = consolidated(Path(card.uri), recipe_of(2, card.step))["unet"]
    return torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])


def faults(output: Path, undisturbed: Path) -> Iterator[str]:
    """How a training differs from the undisturbed one."""
    log, expected = sample_log.read(str(output)), sample_log.read(str(undisturbed))
    wrong = [step for step in log.keys() | expected.keys() if log.get(step) != expected.get(step)]
    if wrong:
        yield f"other samples in steps {sorted(wrong)[:5]}"
    here, there = losses(output), losses(undisturbed)
    if here.keys() != there.keys():
        yield f"the curve has steps {sorted(here.keys() ^ there.keys())} too many or too few"
    off = max(abs(here[step] / there[step] - 1) for step in here.keys() & there.keys())
    apart = weights(output) - weights(undisturbed)
    moved = float(apart.norm() / weights(undisturbed).norm())
    print(f"  losses off by {off:.1e}, weights by {moved:.1e} of their size", flush=True)
    if off > LOSS_TOLERANCE or moved > WEIGHT_TOLERANCE:
        yield f"losses off by {off:.1e}, weights by {moved:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lives", type=int, default=4, help="starts of a round's command that end with a kill")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_clips(directory / "clips", 40)
        recipes = {count: directory / f"recipe-{count}.json" for count in (1, 2)}
        for count, path in recipes.items():
            path.write_text(recipe_of(count, arguments.steps).to_json())
        data = directory / "dataset"
        subprocess.run(
            [sys.executable, ROOT / "pipelines/precompute.py", "--recipe", recipes[2], "--manifest",
             directory / "clips", "--output", data, "--file-names-as-captions"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

        def command(output: Path, workers: int) -> list[str]:
            words = ["--recipe", recipes[workers], "--data", data, "--output", output]
            return [sys.executable, str(ROOT / "pipelines/train.py"), *map(str, words)]

        undisturbed = directory / "undisturbed"
        code, _ = run_and_kill(command(undisturbed, 2), undisturbed)
        assert code == 0, f"the undisturbed training ended with {code}"
        print(f"undisturbed: {arguments.steps} steps", flush=True)
        failed = 0
        for number in range(arguments.rounds):
            rng = random.Random(f"{arguments.seed} {number}")
            output = directory / f"round-{number}"
            print(f"round {number} (seed {arguments.seed})", flush=True)
            lives: Sequence[Sequence[Kill]] = draw(rng, arguments.lives)
            turns = [command(output, 2 - start % 2) for start in range(arguments.lives + 3)]
            for event in disturb(turns, output, lives):
                print(f"  {event}", flush=True)
            wrong = list(faults(output, undisturbed))
            failed += bool(wrong)
            print(f"  {'DIFFERENT: ' + '; '.join(wrong) if wrong else 'equal'}", flush=True)
        print(f"{arguments.rounds - failed} of {arguments.rounds} rounds ended as the undisturbed training")
        sys.exit(bool(failed))


if __name__ == "__main__":
    main()
