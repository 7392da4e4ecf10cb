"""`make bench-train`: what feeds a training against its physical limits; its part of BENCHMARKS.md.

Process CPU time (all threads) on one pinned core; what is compared runs in turns, the best of its repeats counts.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from bench import fill, table
from bench_precompute import in_turns

from cinemo import s3, storage
from cinemo.accelerators import peak_flops
from cinemo.checksums import checksum
from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.data.loading.reader import ShardReader
from cinemo.methods import build_method
from cinemo.networks.memory import keep_freed_memory
from cinemo.recipes import load_recipe, override
from cinemo.training.checkpoint.shares import Memory
from cinemo.training.plan.cost import sample_flops
from cinemo.training.run.batch import FrozenStates, host_batch, latent_shape
from cinemo.training.run.engine import Engine
from cinemo.training.run.loop import Report, train
from cinemo.types import LatentSample

Row = tuple[str, ...]
PAPER, TINY = load_recipe("cinemo-320x512"), load_recipe("cinemo-tiny")
SHARDS, CLIPS, BATCH = 8, 128, 32


def make_dataset(directory: Path, recipe: Recipe) -> DatasetIndex:
    """`SHARDS` shards of `CLIPS` random samples of a recipe's geometry."""
    latents = np.random.default_rng(0).normal(size=(CLIPS, *latent_shape(recipe))).astype(np.float16)
    root, fingerprint = str(directory), "f" * 64
    records = []
    for number in range(SHARDS):
        samples = [
            LatentSample(f"{position:09d}-0", f"clip-{position}", f"s3://clips/{position}.mp4", CAPTION, latents[k],
                         0.5, 24.0, 3, position, extra={"source": "web", "license": "CC-BY"})
            for k, position in enumerate(range(number * CLIPS, (number + 1) * CLIPS))
        ]  # fmt: skip
        records.append(shards.commit(root, number, samples, [], fingerprint))
    storage.write_bytes(storage.join(root, "index.parquet"), shards.index_bytes(records))
    info = {"schema": shards.SCHEMA_VERSION, "complete": True, "samples": SHARDS * CLIPS, "quarantined": 0}
    info |= {"fingerprint": fingerprint, "latent_shape": list(latent_shape(recipe))}
    storage.write_json(storage.join(root, "dataset.json"), info)
    return DatasetIndex.load(root)


def reading(directory: Path, recipe: Recipe) -> Iterator[Row]:
    """One pass over a dataset in the page cache, every latent copied into a batch, against reading its files."""
    index = make_dataset(directory, recipe)
    members = shards.Members(**storage.read_json(shards.record_uri(index.uri, 0))["members"])
    text = json.dumps(shards.read_metadata(index.uri, 0, members)[0])
    files = [Path(shards.tar_uri(index.uri, number)) for number in index.shards]
    buffer = bytearray(max(path.stat().st_size for path in files))
    batch = np.empty((BATCH, *latent_shape(recipe)), np.float16)
    steps = SHARDS * CLIPS // BATCH
    place = 0

    def raw() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                assert file.readinto(buffer) == path.stat().st_size

    def new() -> LatentLoader:
        return LatentLoader(index, global_batch=BATCH, lanes=1, seed=0)

    def epoch(loader: LatentLoader, start: int = 0) -> None:
        for step in islice(loader.batches(start), steps):
            for k, sample in enumerate(step.samples):
                batch[k] = sample.latents_FCHW

    used = new()
    epoch(used)

    def later() -> None:
        nonlocal place
        place += steps  # epoch after epoch: shards are opened and mapped anew
        epoch(used, place)

    def order() -> None:
        for step in range(steps):
            used.order.batch(step)

    def texts() -> None:
        for _ in range(SHARDS * CLIPS):
            json.loads(text)

    def other() -> None:
        for k, entry in enumerate(webdataset.WebDataset(list(map(str, files)), shardshuffle=False).decode()):
            batch[k % BATCH] = entry["latents.npy"]

    def first() -> None:
        epoch(new())

    limit, read, checked, ordering, parsing, hashing = in_turns(
        raw, later, first, order, texts, lambda: [checksum([path.read_bytes()]) for path in files], rounds=6
    )
    (plain,) = in_turns(other, rounds=1)
    samples, size = SHARDS * CLIPS, sum(path.stat().st_size for path in files)
    each = f"{size / samples / 1e3:.0f} KB a sample: {1e6 * read / samples:.0f} us"
    parts = f"order {ordering / read:.0%}, JSON {parsing / read:.0%} of it"
    name = recipe.name
    target = "0.70" if recipe is PAPER else "-"
    yield f"{name}: batches, shards checked before", f"{limit / read:.2f} x raw", target, f"{each}; {parts}"
    yield (
        f"{name}: the first pass, checksum included", f"{limit / checked:.2f} x raw", "-",
        f"the checksum is {hashing / checked:.0%} of it",
    )  # fmt: skip
    yield f"{name}: webdataset, .decode()", f"{limit / plain:.2f} x raw", "-", "in stored order"
    reader = ShardReader(index, (), used._reader.cache, 0)
    reader.get(0)
    (opening,) = in_turns(lambda: reader._load(0), rounds=6)
    yield f"{name}: open a shard again", f"{1e3 * opening:.1f} ms", "-", "a thread does it ahead"
    samples_of_step = used.batch(0).samples
    (draws,) = in_turns(lambda: host_batch(samples_of_step, 0, recipe), rounds=6)
    yield f"{name}: float32, noise and draws", f"{1e6 * draws / BATCH:.0f} us", "-", "a sample, in the same thread"
    feeds = 1 / (read / samples + draws / BATCH)
    yield f"{name}: one data thread feeds", f"{feeds:.0f} samples/s", "-", "reading and draws together"


@contextmanager
def s3_bucket(cores: set[int]) -> Iterator[str]:
    """An empty bucket on an S3 server of its own, which runs on ``cores``."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.sched_setaffinity(server.pid, cores)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    try:
        s3.client().mkdir("bench")
        yield "s3://bench"
    finally:
        server.kill()


def data_wait(index: DatasetIndex, where: str) -> Iterator[Row]:
    """The tiny recipe's own steps on one core, which its data thread shares."""
    recipe = override(TINY, [f"train.max_steps={STEPS}", "train.workers=1", "train.log_every=1"])
    engine = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
    text = FrozenStates.of(recipe)
    reports: list[Report] = []
    device, flops = torch.device("cpu"), sample_flops(recipe).training
    train(
        recipe, engine, LatentLoader.of(index, recipe.train).batches(), text, on_report=reports.append,
        sample_seconds=flops / peak_flops(device, torch.float32),
    )  # fmt: skip
    steady = reports[2:]
    seconds = np.mean([recipe.train.global_batch / report.samples_per_second for report in steady])
    share = np.mean([report.data_wait for report in steady])
    mfu = np.mean([report.mfu for report in steady])
    note = f"of steps of {seconds:.1f} s, one core for all; MFU {mfu:.0%} of a matrix product's rate"
    yield f"cinemo-tiny: waiting for data, {where}", f"{share:.2%}", "< 2 %", note


def waiting(directory: Path) -> Iterator[Row]:
    """Local shards, then the same on an S3 server, nothing of it in the cache."""
    rendezvous = directory / "group"
    torch.distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=0, world_size=1)
    keep_freed_memory()
    yield from data_wait(DatasetIndex.load(str(directory)), "local")
    own = os.sched_getaffinity(0)
    with s3_bucket(set(range(os.cpu_count() or 1)) - own or own) as bucket:
        storage.upload(directory, storage.join(bucket, "tiny"))
        os.environ["CINEMO_CACHE"] = str(directory / "cache")
        yield from data_wait(DatasetIndex.load(storage.join(bucket, "tiny")), "s3://, cold cache")
    torch.distributed.destroy_process_group()


def loader_part(scratch: Path) -> str:
    rows = [*reading(scratch / "paper", PAPER), *reading(scratch / "tiny", TINY), *waiting(scratch / "tiny")]
    return LOADER.format(rows=table(("loader", "value", "target", ""), rows), samples=SHARDS * CLIPS, batch=BATCH)


def checkpoints_of(directory: Path, recipe: Recipe, name: str) -> Iterator[Row]:
    """How long a step waits for its checkpoint, and how long that is written afterwards, onto this disk."""
    recipe = override(recipe, ["train.workers=1", "train.max_steps=1"])
    engine = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
    memory, copies, writes = Memory(), [], []
    for number in range(5):
        begun = time.perf_counter()
        taken = engine.snapshot({}, memory)
        copied = time.perf_counter()
        taken.write(directory / name / str(number))
        copies.append(copied - begun)
        writes.append(time.perf_counter() - copied)
    size = sum(taken.sizes.values())
    later, write = min(copies[1:]), min(writes)
    note = f"the first one {1e3 * copies[0]:.0f} ms, {size / later / 1e9:.1f} GB/s; writing {1e3 * write:.0f} ms"
    yield f"{name}, {size / 1e6:.0f} MB: a step waits for its checkpoint", f"{1e3 * later:.0f} ms", "-", note


def checkpoint_part(scratch: Path) -> str:
    wide = override(TINY, ["model.block_out_channels=[256,512]", "train.init=null"])
    torch.distributed.init_process_group("gloo", init_method=(scratch / "own").as_uri(), rank=0, world_size=1)
    rows = [*checkpoints_of(scratch, TINY, "cinemo-tiny"), *checkpoints_of(scratch, wide, "16 times as large")]
    torch.distributed.destroy_process_group()
    return CHECKPOINTS.format(rows=table(("checkpoint", "value", "target", ""), rows))


def main(parts: Sequence[Callable[[Path], str]] = (loader_part, checkpoint_part)) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        fill(TITLE, "".join(part(Path(directory)) for part in parts))


STEPS = 8
CAPTION = "a small dog runs across a wide green field towards the camera, its ears flying in the wind"
TITLE = "## Training"
LOADER = """
Made with `make bench-train`: process CPU time of all threads on one pinned core, in turns, best of several. Loader:
{samples} samples in the page cache, batches of {batch}, every latent copied into a batch once; raw is reading the same
files with `readinto`. Every epoch opens and maps the shards again.

{rows}

A sample costs about 10 us on top of its bytes: its JSON, its place in the order, a Python object. Large samples hide
them, small ones do not. The first pass is bound by the checksum, paid once per shard and process in the thread that
opens it ahead. Noise costs more than all reading; it is drawn in the data thread, alongside the step.
"""

CHECKPOINTS = """
Checkpoints, wall-clock time on the same core, best of five, on a local disk, flushed: what is written was copied
before, and steps go on meanwhile.

{rows}
"""


if __name__ == "__main__":
    main()
