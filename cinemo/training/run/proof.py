"""``train.py --verify-resume``: the same training twice, once undisturbed, once killed twice and resized, and the proof
that both saw the same samples in the same order, and every sample of the epoch exactly once.

The second training begins with all workers, is killed (SIGKILL of everything) in the middle of a step after a
checkpoint, goes on with half of the workers, is killed again, and ends with all of them. With ``--change-batch`` both
go on from the middle with twice the global batch and lanes.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.loading.mix import MixedLoader
from cinemo.data.loading.source import Source
from cinemo.progress import doing, say
from cinemo.recipes import override
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log
from cinemo.training.run.growth import TrainingData, opened
from cinemo.training.run.left_out import NOTHING, LeftOut
from cinemo.types import InputError, RunError

STRAIGHT, INTERRUPTED = "straight", "interrupted"
_CHECKPOINTS = 6  # of the whole training: kills come after the second and the fourth
_LEAST_STEPS = 24  # of a small dataset several epochs, or the training would be over before it can be killed
_POLL_SECONDS = 0.2
_INTO_THE_STEP = 0.7  # seconds after a checkpoint's commit
_PATIENCE = 3600.0
_SHOWN = 3


@dataclass(frozen=True)
class Life:
    """One start of the training: with how many workers, after which checkpoint it is killed (None: not), and other
    settings than the recipe's.
    """

    workers: int
    killed_after: int | None
    settings: list[str] = field(default_factory=list)


def verify_resume(
    recipe: Recipe, data: Sequence[Source], output: str, script: str, change_batch: bool = False
) -> list[str]:
    """Run both trainings under ``output`` and return the lines of the proof; also written to ``proof.json``.

    Args:
        recipe: trained as it is, for one epoch and a step or ``train.max_steps``, whichever is less, but at
            least 24 steps.
        output: new directory, local: processes are watched and killed on this machine.
        script: path of ``pipelines/train.py``.
        change_batch: whether both trainings go on from the middle with twice the global batch and lanes.

    Raises:
        InputError: the recipe has no smaller number of workers, or ``output`` is in use.
        RunError: a training failed, or the two differ.
    """
    if storage.is_remote(output):
        raise InputError(f"--output {output}: expected a local directory for --verify-resume")
    if storage.names(output):
        raise InputError(f"--output {output}: is not empty; choose another one for --verify-resume")
    data, root = [replace(one, uri=storage.absolute(one.uri)) for one in data], storage.absolute(output)
    indexes = opened(data)
    shards_of = [[(0, len(index.shards))] for index in indexes]
    loader = TrainingData(data, indexes, shards_of, recipe.train).loader
    samples = sum(one.order.samples for one in loader.loaders)
    epoch = -(-samples // recipe.train.global_batch)
    steps = max(_LEAST_STEPS, min(recipe.train.max_steps, epoch + 1))
    every = steps // _CHECKPOINTS
    settings = [f"train.max_steps={steps}", f"train.checkpoint_every={every}", "train.log_every=1"]
    settings += ["train.grow=false"]  # both trainings see the same dataset, whatever happens to it meanwhile
    recipe = override(recipe, [*settings, "train.sample_count=1", "train.sample_every=0", "train.validate_every=0"])
    fewer = _fewer(recipe)
    straight = [Life(recipe.train.workers, None)]
    lives = [Life(recipe.train.workers, 2 * every), Life(fewer, 4 * every), Life(recipe.train.workers, None)]
    if change_batch:
        middle, size, lanes = 3 * every, 2 * recipe.train.global_batch, 2 * recipe.train.reading_lanes
        before, after = [f"train.max_steps={middle}"], [f"train.global_batch={size}", f"train.lanes={lanes}"]
        straight = [Life(recipe.train.workers, None, before), Life(recipe.train.workers, None, after)]
        lives = [replace(lives[0], settings=before), Life(fewer, None, before), replace(lives[1], settings=after)]
        lives.append(straight[1])
        batches = [(0, recipe.train.global_batch, recipe.train.reading_lanes), (middle, size, lanes)]
        loader = TrainingData(data, indexes, shards_of, recipe.train, batches=batches).loader

    _train(recipe, data, storage.join(root, STRAIGHT), script, straight)
    _train(recipe, data, storage.join(root, INTERRUPTED), script, lives)
    there, here = (sample_log.read(storage.join(root, name)) for name in (STRAIGHT, INTERRUPTED))
    faults = [
        *_differences(there, here, steps),
        *_against_index(loader, here, steps, LeftOut.of(recipe.train)),
    ]
    seen = sum(len(keys) for keys in here.values())
    of_epoch = min(samples, seen)
    passed = sum(loader.at(step).global_batch for step in there) - seen
    loss = _loss_difference(root)
    lines = [
        f"straight:     {recipe.train.workers} workers, {steps} steps"
        + (f", from step {middle} on with global batch {size} and {lanes} lanes" if change_batch else ""),
        "interrupted:  " + ", ".join(_say(life) for life in lives),
        f"sample ids:   {sum(map(len, there.values()))} and {seen}, in order "
        + ("equal" if there == here else "DIFFERENT"),
        f"first epoch:  {of_epoch} of {samples} samples, "
        + ("NOT " if faults else "")
        + "each exactly once"
        + (f"; {passed} left out in {len(there)} steps, as train.skip_* says" if passed else ""),
        f"loss:         the two curves differ by at most {loss:.1e} of their value",
    ]
    storage.write_json(
        storage.join(root, "proof.json"),
        {"steps": steps, "samples": seen, "equal": not faults, "loss_difference": loss, "faults": faults[:100]},
    )
    if faults:
        raise RunError(f"{output}: {'; '.join(faults[:_SHOWN])} ({len(faults)} faults, see proof.json)")
    return lines


def _fewer(recipe: Recipe) -> int:
    """The largest smaller number of workers with which the recipe can run."""
    for workers in range(recipe.train.workers - 1, 0, -1):
        try:
            override(recipe, [f"train.workers={workers}"])
        except InputError:
            continue
        return workers
    raise InputError(
        f"train.workers is {recipe.train.workers}: --verify-resume continues with fewer, but no lower number fits "
        f"train.micro_batch = {recipe.train.micro_batch} and train.global_batch = {recipe.train.global_batch}; "
        "--set train.workers=2"
    )


def _say(life: Life) -> str:
    many = f"{life.workers} worker" + ("s" if life.workers > 1 else "")
    return (
        many
        + (f", killed after step {life.killed_after}" if life.killed_after else " to the end")
        + "".join(f", {setting}" for setting in life.settings)
    )


def _train(recipe: Recipe, data: Sequence[Source], output: str, script: str, lives: Sequence[Life]) -> None:
    name = output.rsplit("/", 1)[-1]
    for life in lives:
        changed = override(recipe, [f"train.workers={life.workers}", *life.settings])
        storage.write_bytes(f"{output}.json", changed.to_json().encode())
        flags = [word for source in data for word in source.flags]
        command = [sys.executable, script, "--recipe", f"{output}.json", *flags, "--output", output, "--change-batch"]
        say(f"{name}: {_say(life)}")
        with Path(f"{output}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with doing(f"{name}: {_say(life)}"):
                code = _wait(process, output, life.killed_after)
        finally:
            _kill(process)
        if life.killed_after is None and code:
            last = (Path(f"{output}.log").read_text(errors="replace").splitlines() or [""])[-1]
            raise RunError(f"{name}: the training ended with exit code {code}: {last}")


def _wait(process: subprocess.Popen[bytes], output: str, killed_after: int | None) -> int | None:
    """Until the process ends (its exit code), or a checkpoint of that step is complete and the next step runs."""
    begun = time.monotonic()
    while (code := process.poll()) is None:
        if time.monotonic() - begun > _PATIENCE:
            raise RunError(f"{output}: did not end within {_PATIENCE:g} s; see {output}.log")
        card = checkpoints.latest(output) if killed_after else None
        if card and killed_after and card.step >= killed_after:
            time.sleep(_INTO_THE_STEP)
            return None
        time.sleep(_POLL_SECONDS)
    if killed_after:
        raise RunError(f"{output}: ended with exit code {code} before it could be killed; see {output}.log")
    return code


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the command and everything that it started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    process.wait()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def _differences(there: dict[int, list[str]], here: dict[int, list[str]], steps: int) -> Iterator[str]:
    for name, log in ((STRAIGHT, there), (INTERRUPTED, here)):
        if sorted(log) != list(range(steps)):
            yield f"{name}: the log has {len(log)} steps, expected {steps}"
    for step in sorted(there.keys() & here.keys()):
        if there[step] != here[step]:
            yield f"step {step}: {STRAIGHT} saw {there[step][:3]}..., {INTERRUPTED} {here[step][:3]}..."


def _against_index(
    loader: MixedLoader, log: dict[int, list[str]], steps: int, left_out: LeftOut = NOTHING
) -> Iterator[str]:
    """What was seen against what the indexes say was to be seen, without what the recipe leaves out; and the epochs of
    each, what is left out included, against all there is.
    """
    keys = [
        [storage.read_json(shards.record_uri(one.index.uri, shard))["members"]["keys"] for shard in one.index.shards]
        for one in loader.loaders
    ]
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for step in range(steps):
        mixed = loader.at(step).places(step)
        expected = [loader.key(one.source, keys[one.source][one.place.shard][one.place.index]) for one in mixed]
        if left_out.seen(step, expected) != log.get(step):
            yield f"step {step}: the samples are not those of the canonical order"
        views = [one.order.views for one in loader.loaders]
        seen.update(
            (one.source, one.place.epoch, one.place.shard, one.place.index // views[one.source]) for one in mixed
        )
    again = [place for place, count in seen.items() if count > 1]
    if again:
        yield f"{len(again)} samples were seen more than once in an epoch"
    found = Counter((source, epoch) for source, epoch, _, _ in seen)
    for source, one in enumerate(loader.loaders):
        for epoch in range(one.order.epoch_before(loader.read_before(steps, source))):
            if found[source, epoch] != one.order.samples:
                samples = f"{found[source, epoch]} of {one.order.samples} samples of {one.index.uri}"
                yield f"epoch {epoch} saw {samples}"


def _loss_difference(root: str) -> float:
    """The largest difference between both loss curves, relative to the loss."""
    curves = []
    for name in (STRAIGHT, INTERRUPTED):
        text = storage.read_bytes(storage.join(root, name, "loss.csv")).decode()
        curves.append({int(row["step"]): float(row["loss"]) for row in csv.DictReader(io.StringIO(text))})
    return max((abs(curves[0][step] / curves[1][step] - 1) for step in curves[0].keys() & curves[1].keys()), default=0)
