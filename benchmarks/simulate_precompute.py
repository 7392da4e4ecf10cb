"""`make simulate`: precompute on clusters of one to a thousand nodes; its tables of docs/scale.md.

First the simulation is held against real runs here: two nodes of one core each, undisturbed, and with one of them taken
away in the middle and another that comes later. What Ray's driver takes for a block is measured as CPU time of its
process. ``--calibrate`` does that too; without it the figures of the last time are used, which docs/scale.json keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import ROOT, fill, table
from simulation import Fleet, Limits, Result, Work, simulate

FIGURES = ROOT / "docs" / "scale.json"
PAGE = "docs/scale.md"
CLIPS = 3_500_000  # simulated; ten times as many take ten times as long, but for the ends of a run
# Of `precompute.py --plan` over the real clips, recipe cinemo-320x512, and the spread of its sample.
DECODE_SECONDS, SPREAD = 0.18, 0.9
ENCODE_FLOPS, A100_FLOPS, SHARE = 11.04e12, 312e12, 0.3
CPU_ENCODE_SECONDS = 0.08  # the tiny autoencoder on a core
GETS_PER_PREFIX = 5500.0  # what Amazon S3 documents for one prefix
SPOT_CORE_HOUR, A100_HOUR = 0.02, 1.8  # USD, an assumption: write your own prices
SLOTS, PER_NODE = 31, 8  # of a node with 32 cores; A100s of a node
# Blocks a core whose results may wait: Ray Data gives a stage about half of the object store, 19 of 128 GB, and a block
# of latents has 21 MB, one of frames 64.
WINDOW_OF_LATENTS, WINDOW_OF_FRAMES = 30.0, 10.0


def driver_seconds(blocks: int = 1000) -> float:
    """CPU seconds of the driver's process for a block that passes the graph of decode, encode and commit."""
    import psutil
    import pyarrow as pa
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    class Pass:
        def __call__(self, rows: pa.Table) -> pa.Table:
            return rows

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    actors = {"batch_format": "pyarrow", "compute": ActorPoolStrategy(min_size=1, max_size=1), "num_cpus": 0}
    graph = ray.data.from_arrow([pa.table({"clip": [block] * 16}) for block in range(blocks)])
    graph = graph.map_batches(lambda rows: rows, batch_format="pyarrow", batch_size=None, num_cpus=1, max_calls=500)
    graph = graph.map_batches(Pass, batch_size=None, **actors).map_batches(Pass, batch_size=256, **actors)
    me, marks = psutil.Process(), []
    for _ in graph.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        times = me.cpu_times()
        marks.append(times.user + times.system)
    first, last = len(marks) // 5, len(marks) - 1 - len(marks) // 5
    return (marks[last] - marks[first]) / ((last - first) * 16)


def real_run(clips: int, taken: float | None, absent: float) -> dict[str, float]:
    """A run over rendered clips on two nodes of a core each.

    Args:
        taken: share of the shards after which one node goes, for ``absent`` seconds; None: never.

    Returns:
        ``seconds`` of the run, ``per_clip`` of all stages, and when that share, or the first shard, was committed.
    """
    import ray
    from ray.cluster_utils import Cluster

    from cinemo.data.precompute import graph
    from cinemo.data.precompute.cluster import connect
    from cinemo.media.synthetic import render_clips
    from cinemo.recipes import load_recipe

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    os.environ["RAY_ADDRESS"] = cluster.address
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    try:
        with tempfile.TemporaryDirectory() as directory:
            manifest = render_clips(Path(directory) / "clips", 24)
            rows = [json.loads(line) for line in manifest.read_text().splitlines()]
            many = [rows[k % len(rows)] | {"clip_id": f"clip-{k}"} for k in range(clips)]
            manifest.write_text("".join(json.dumps(row) + "\n" for row in many))
            recipe = load_recipe("cinemo-tiny", ["data.clips_per_shard=32"])
            output = Path(directory) / "out"
            connect()
            begun = time.perf_counter()
            with ThreadPoolExecutor(1) as pool:  # Ray starts nodes in the main thread alone
                running = pool.submit(lambda: (graph.run(recipe, str(manifest), str(output)), time.perf_counter()))
                enough = max(1, (taken or 0) * clips / 32)
                while len(list((output / "shards").glob("*.json"))) < enough and not running.done():
                    time.sleep(0.05)
                mark = time.perf_counter()
                if taken:
                    cluster.remove_node(second, allow_graceful=False)
                    time.sleep(absent)
                    cluster.add_node(num_cpus=1)
                summary, ended = running.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
        del os.environ["RAY_ADDRESS"]
    seconds = sum(summary["stage_seconds"].values()) / clips
    return {"seconds": ended - begun, "per_clip": seconds, "mark": mark - begun}


def calibrate() -> dict[str, Any]:
    import ray

    from cinemo.data.precompute.cluster import connect

    connect()
    driver = driver_seconds()
    ray.shutdown()
    clips, absent = 480, 15.0
    runs = [("undisturbed", real_run(clips, None, 0.0)), ("a node of two taken away", real_run(clips, 0.4, absent))]
    calm = runs[0][1]
    # Start-up: until the first shard, less the work in it.
    boot = max(0.0, calm["mark"] - 32 * calm["per_clip"] / 2)
    rows = []
    for name, run in runs:
        taken = ((1, run["mark"]),) if run is not calm else ()
        fleet = Fleet(2, 1, boot=boot, provision=absent, taken=taken)
        made = simulate(Work(clips, run["per_clip"], 0.3, block=32, shard=32), fleet)
        rows.append({"run": name, "real": run["seconds"], "simulated": made.seconds, "again": made.again})
    return {"driver_seconds_per_block": driver, "boot_seconds": boot, "runs": rows}


def work_on_accelerators(clips: int = CLIPS) -> Work:
    # 64 MB of frames a task: 8 clips of 16 x 320 x 512.
    return Work(clips, DECODE_SECONDS, SPREAD, 1e-4, encode_seconds=ENCODE_FLOPS / (SHARE * A100_FLOPS), block=8)


def work_on_cores(clips: int = CLIPS) -> Work:
    return Work(clips, DECODE_SECONDS + CPU_ENCODE_SECONDS, SPREAD, 1e-4, block=64)


def cost(fleet: Fleet, made: Result) -> float:
    """USD."""
    return made.paid / 3600 * SPOT_CORE_HOUR * 32 / SLOTS + fleet.accelerators * made.seconds / 3600 * A100_HOUR


def row(name: str, fleet: Fleet, made: Result) -> tuple[str, ...]:
    share = made.shares()
    busy = made.accelerator_busy / (fleet.accelerators * made.seconds) if fleet.accelerators else None
    return (
        name,
        f"{made.seconds / 3600:.1f}",
        f"{made.paid / 3600 / SLOTS:,.0f}",
        f"{cost(fleet, made):,.0f}",
        *(f"{100 * share[key]:.1f}%" for key in ("useful", "lost", "waiting", "booting", "idle")),
        f"{100 * busy:.0f}%" if busy is not None else "-",
        f"{made.interruptions:,}",
    )


HEAD = (
    "cluster",
    "hours",
    "node hours",
    "USD",
    "useful",
    "lost",
    "storage",
    "boot",
    "idle",
    "accelerators busy",
    "nodes lost",
)


def growing(limits: Limits) -> Iterator[tuple[str, Fleet, Result]]:
    """From one node of 32 spot cores to a thousand, encoding on the same cores."""
    for nodes in (1, 3, 10, 30, 100, 300, 1000):
        fleet = Fleet(nodes, SLOTS, interrupted_hours=20.0)
        yield f"{nodes:,} nodes of 32 cores", fleet, simulate(work_on_cores(), fleet, limits)


def with_accelerators(limits: Limits) -> Iterator[tuple[str, Fleet, Result]]:
    for nodes in (1, 4, 16, 64):
        accelerators = nodes * PER_NODE
        fleet = Fleet(nodes, SLOTS, accelerators, interrupted_hours=20.0)
        frames = replace(limits, window=WINDOW_OF_FRAMES)
        yield f"{nodes} of 32 cores, {accelerators} A100", fleet, simulate(work_on_accelerators(), fleet, frames)


def disturbances(limits: Limits) -> Iterator[tuple[str, Fleet, Result]]:
    """A hundred nodes of 32 cores, one thing after another made worse."""
    fleet, work = Fleet(100, SLOTS, interrupted_hours=20.0), work_on_cores()
    yield "as above", fleet, simulate(work, fleet, limits)
    for name, other in (
        ("never interrupted", replace(fleet, interrupted_hours=None)),
        ("interrupted every 2 hours", replace(fleet, interrupted_hours=2.0)),
        ("the same, without notice", replace(fleet, interrupted_hours=2.0, notice=0.0)),
    ):
        yield name, other, simulate(work, other, limits)
    yield "1 clip in 100 runs into the timeout of 120 s", fleet, simulate(replace(work, stalled=0.01), fleet, limits)
    yield (
        "all clips under one S3 prefix",
        fleet,
        simulate(work, fleet, replace(limits, objects_per_second=GETS_PER_PREFIX)),
    )
    yield "no limit of the driver", fleet, simulate(work, fleet, replace(limits, tasks_per_second=float("inf")))


def plot(rows: list[tuple[str, Fleet, Result]], accelerated: list[tuple[str, Fleet, Result]], ideal: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    nodes = [fleet.nodes for _, fleet, _ in rows]
    left.loglog(nodes, [made.seconds / 3600 for *_, made in rows], "o-", label="simulated, tiny autoencoder on cores")
    left.loglog(nodes, [ideal / 3600 / (SLOTS * count) for count in nodes], "--", color="grey", label="work / cores")
    left.loglog(
        [fleet.nodes for _, fleet, _ in accelerated],
        [made.seconds / 3600 for *_, made in accelerated],
        "s-",
        label="with 8 A100 a node, published autoencoder",
    )
    left.set(xlabel="nodes of 32 cores", ylabel="hours for 3.5 million clips")
    left.legend()
    bottom = [0.0] * len(rows)
    for key in ("useful", "lost", "waiting", "booting", "idle"):
        heights = [made.shares()[key] * made.paid / 3600 / SLOTS for *_, made in rows]
        right.bar([str(count) for count in nodes], heights, bottom=bottom, label=key)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    right.set(xlabel="nodes of 32 cores", ylabel="node hours paid")
    right.legend()
    figure.savefig(ROOT / "docs" / "scale.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate", action="store_true", help="measure driver and real runs here again")
    arguments = parser.parse_args()
    if arguments.calibrate:
        FIGURES.write_text(json.dumps(calibrate(), indent=2) + "\n")
    known = json.loads(FIGURES.read_text())
    limits = Limits(tasks_per_second=1 / known["driver_seconds_per_block"], window=WINDOW_OF_LATENTS)
    held = [(run["run"], f"{run['real']:.0f}", f"{run['simulated']:.0f}", str(run["again"])) for run in known["runs"]]
    fill(
        "### Held against real runs", "\n" + table(("run", "real, s", "simulated, s", "blocks done again"), held), PAGE
    )
    grown, accelerated = list(growing(limits)), list(with_accelerators(limits))
    for title, rows in (
        ("### More nodes", grown),
        ("### With accelerators", accelerated),
        ("### What goes wrong", list(disturbances(limits))),
    ):
        fill(title, "\n" + table(HEAD, [row(*entry) for entry in rows]), PAGE)
    work = work_on_cores()
    plot(grown, accelerated, work.clips * work.seconds)


if __name__ == "__main__":
    main()
