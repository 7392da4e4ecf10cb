"""The Ray graph of precompute against what its stages do alone; its part of BENCHMARKS.md (`make bench-precompute`).

The bound is that of the resource that is short. Here all stages share the cores, so it is cores / (CPU seconds of all
stages for one clip, each measured alone, on all cores at once). The graph's rate is taken between two commits in its
steady state: worker start-up before and the emptying pipeline after are left out and stated. Cores that other processes
take meanwhile are taken off the bound.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from bench import table

from cinemo import s3
from cinemo.config import Recipe
from cinemo.data.dataset.identity import encoder_dtype
from cinemo.data.manifest.manifest import read_manifest
from cinemo.data.precompute import cluster, stages
from cinemo.data.precompute import graph as precompute
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.plan import make_plan
from cinemo.media.synthetic import render_clips
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_tiny

ROOT = Path(__file__).resolve().parent.parent
TITLE = "## The precompute graph"
ROUNDS = 3
VIDEOS = (".mp4", ".webm", ".avi")


def manifest(sources: list[Path], clips: int, directory: Path) -> str:
    rows = [{"clip_id": f"c{k:06d}", "uri": str(sources[k % len(sources)]), "caption": "x"} for k in range(clips)]
    (directory / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory / "m.jsonl")


def alone(recipe: Recipe, dataset: Dataset, clips: int) -> dict[str, float]:
    """CPU seconds of one clip in each stage, with every core of the machine at the same work: cores share caches."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        jobs = [pool.apply_async(one_after_the_other, (recipe, dataset, clips, k)) for k in range(os.cpu_count() or 1)]
        found = [job.get() for job in jobs]
    return {stage: sum(each[stage] for each in found) / len(found) for stage in found[0]}


def one_after_the_other(recipe: Recipe, dataset: Dataset, clips: int, number: int) -> dict[str, float]:
    """CPU seconds of one clip in each stage, in this process and the one that decodes for it."""
    data = recipe.data
    rows = dataset.plan.rows(range(clips // data.clips_per_shard)).slice()
    encoder = stages.Encoder(data, recipe.encoders.vae, recipe.encoders.latent, encoder_dtype(recipe))
    encoder(stages.score(stages.decode(rows.slice(0, 2), data), data))  # the first clip pays for set-up
    family = Family()
    marks = [family.cpu()]

    def lap(value: Any) -> Any:
        marks.append(family.cpu())
        return value

    decoded = lap(stages.decode(rows, data))
    scored = lap(stages.score(decoded, data))
    encoded = lap(encoder(scored))
    for shard in range(clips // data.clips_per_shard):
        shard_rows = encoded.slice(shard * data.clips_per_shard, data.clips_per_shard)
        stages.commit(shard_rows, f"{dataset.uri}-alone-{number}", dataset.fingerprint, data.views)
    lap(None)
    names = ("decode", "score", "encode", "commit")
    return {name: (b - a) / clips for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)}


class Family:
    """CPU seconds of this process and its descendants, those that have ended included, and of the whole machine."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def cpu(self) -> float:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            self.seen[process.pid] = times.user + times.system
        return sum(self.seen.values())

    @staticmethod
    def machine() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system + times.nice + times.softirq)


def whole(dataset: Dataset) -> dict[str, float]:
    """Rate and CPU seconds a clip of the graph between its first fifth and its last fifth, and what is outside."""
    family, begun = Family(), time.perf_counter()
    rows = dataset.plan.rows(dataset.missing_shards())
    dataset.begin()
    marks: list[tuple[float, float, float, int]] = []
    done = 0
    for shard in precompute._execute(rows, dataset, None):
        done += shard["clips"]
        marks.append((time.perf_counter(), family.cpu(), family.machine(), done))
    first, last = marks[len(marks) // 5], marks[-1 - len(marks) // 5]
    clips, seconds = last[3] - first[3], last[0] - first[0]
    own, all_of_it = last[1] - first[1], last[2] - first[2]
    return {
        "rate": clips / seconds,
        "cpu": own / clips,
        "own_cores": own / seconds,
        "other_cores": max(0.0, all_of_it - own) / seconds,
        "first_shard": marks[0][0] - begun,
        "total": marks[-1][0] - begun,
    }


def measure(name: str, recipe: Recipe, sources: list[Path], clips: int) -> tuple[str, ...]:
    """The middle of three rounds. A machine's pace drifts: the stages run before and after each graph."""
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(read_manifest(manifest(sources, clips, Path(scratch))), recipe)
        after: dict[str, float] = {}
        for number in range(ROUNDS):
            dataset = Dataset.open(str(Path(scratch) / f"dataset-{number}"), recipe, plan)
            before = after or alone(recipe, dataset, min(clips, 64))
            run = whole(dataset)
            after = alone(recipe, dataset, min(clips, 64))
            work = {stage: (before[stage] + after[stage]) / 2 for stage in before}
            free = (os.cpu_count() or 1) - run["other_cores"]
            run |= {"free": free, "work": sum(work.values()), "bound": free / sum(work.values())}
            rounds.append((run["rate"] / run["bound"], run, work))
            print(name, *rounds[-1], flush=True)
    rounds.sort(key=lambda entry: entry[0])
    ratio, run, work = rounds[len(rounds) // 2]
    return (
        name,
        " + ".join(f"{1000 * work[stage]:.0f}" for stage in work),
        f"{run['bound']:.2f}",
        f"{run['rate']:.2f}",
        f"{ratio:.2f} ({rounds[0][0]:.2f} to {rounds[-1][0]:.2f})",
        f"{run['work'] / run['cpu']:.2f}",
        f"{run['own_cores']:.2f} of {run['free']:.2f}",
        f"{run['first_shard']:.0f} of {run['total']:.0f} s",
    )


def slow_writer(seconds: float, store_mb: int = 80, bytes_per_second: float = 60_000) -> dict[str, Any]:
    """Commit through an S3 server that takes in 60 kB/s: what waits in memory, early and late, in a small store.

    Ends this process.
    """
    import ray
    from faulty_s3 import faulty_s3
    from moto.server import ThreadedMotoServer
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    with faulty_s3(f"http://{host}:{port}") as proxy, tempfile.TemporaryDirectory() as scratch:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        s3.client().mkdir("bench")
        ray.init(
            address="local", object_store_memory=store_mb << 20, include_dashboard=False, logging_level="ERROR",
            log_to_driver=False,
        )  # fmt: skip
        recipe = override(cinemo_tiny(), ["data.clips_per_shard=16"])
        source = manifest(rendered(Path(scratch)), 20_000, Path(scratch))
        dataset = Dataset.open("s3://bench/slow", recipe, make_plan(read_manifest(source), recipe))
        dataset.begin()
        proxy.meet(bytes_per_second=bytes_per_second)
        state, samples = get_state_from_address(ray.get_runtime_context().gcs_address), []
        begun: float | None = None

        def listen(figures: Any) -> None:
            nonlocal begun
            begun = begun or (time.perf_counter() if figures.encoded else None)
            if begun:
                reply = get_memory_info_reply(state)
                own = [process.memory_info() for process in psutil.Process().children(recursive=True)]
                samples.append(
                    {
                        "seconds": time.perf_counter() - begun,
                        "ahead": figures.decoded - figures.committed,
                        "committed": figures.committed,
                        "store_mb": reply.store_stats.object_store_bytes_used / 1e6,
                        "spilled_mb": reply.store_stats.spilled_bytes_total / 1e6,
                        "private_mb": sum(info.rss - info.shared for info in own) / 1e6,
                    }
                )

        with cluster.watch(20_000, dataset.recipe, listen) as (progress, meter):
            for shard in precompute._execute(dataset.plan.rows(dataset.missing_shards()), dataset, None, meter):
                progress.add(shard)
                if begun and time.perf_counter() - begun > seconds:
                    break
    half = len(samples) // 2
    early, late = samples[half // 2 : half], samples[half:]
    return {
        "committed": samples[-1]["committed"],
        **{
            f"{name}_{when}": max(sample[name] for sample in part)
            for name in ("ahead", "store_mb", "spilled_mb", "private_mb")
            for when, part in (("early", early), ("late", late))
        },
    }


def rendered(directory: Path) -> list[Path]:
    render_clips(directory, 12, seed=0)
    return sorted(path for path in directory.glob("*.mp4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--videos", type=Path, default=ROOT.parent / "shared" / "clips")
    parser.add_argument("--cases", default="real,rendered")
    parser.add_argument("--write", action="store_true", help="put the table into BENCHMARKS.md")
    parser.add_argument("--slow-seconds", type=int, default=120)
    parser.add_argument("--slow-writer", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.slow_writer:
        print(json.dumps(slow_writer(arguments.slow_writer)), flush=True)
        os._exit(0)
    recipe = override(cinemo_tiny(), ["data.clips_per_shard=16"])
    cluster.connect()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        real = sorted(path for path in arguments.videos.glob("*.*") if path.suffix in VIDEOS)
        if real and "real" in arguments.cases:
            rows.append(measure(f"{len(real)} real clips, 240p to 1080p", recipe, real, arguments.clips))
        if "rendered" in arguments.cases:
            small = rendered(Path(scratch))
            rows.append(measure("12 rendered clips, easy to decode", recipe, small, 3 * arguments.clips))
    command = [sys.executable, __file__, "--slow-writer", str(arguments.slow_seconds)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    slow = json.loads(ended.stdout.splitlines()[-1])
    text = TEXT + table(HEAD, rows) + "\n" + SLOW.format(seconds=arguments.slow_seconds, **slow)
    print(text)
    if arguments.write:
        path = ROOT / "BENCHMARKS.md"
        before, _, after = path.read_text().partition(f"\n{TITLE}\n")
        rest = after.partition("\n## ")[2]
        path.write_text(f"{before.rstrip()}\n\n{TITLE}\n{text}" + (f"\n## {rest}" if rest else ""))


HEAD = (
    "clips", "CPU ms a clip: decode + score + encode + commit", "bound, clips/s", "graph, clips/s", "graph / bound",
    "stages' share of its CPU", "cores busy", "first shard after",
)  # fmt: skip
TEXT = """
Made with `make bench-precompute`: `cinemo-tiny`, all stages on the cores of one machine. The bound is what the cores
would do if they did nothing but the stages' own work: free cores / CPU seconds of a clip, each stage measured alone,
on all cores at once, before and after the graph (the middle of three rounds, and their range). The graph's rate is that
between its first and last fifth of shards; start-up (Ray's workers import torch) is the last column. Cores taken by
other processes meanwhile are taken off the bound.

"""

SLOW = """
Under a slow writer (an S3 server that takes in 60 kB/s, an object store of 80 MB, {seconds} s; {committed} clips were
committed): clips decoded ahead of the last commit {ahead_early} in the second quarter, {ahead_late} in the second half;
object store {store_mb_early:.0f} and {store_mb_late:.0f} MB, spilled {spilled_mb_late:.0f} MB; private memory of all
processes {private_mb_early:.0f} and {private_mb_late:.0f} MB.
"""


if __name__ == "__main__":
    main()
