"""`make bench-scale`: 35,000,000 clips are read, checked and planned, and a run over them that was stopped half way is
taken up again; its part of BENCHMARKS.md. About seven minutes on two cores, in 13 GB of disk.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from bench import SCALE_TITLE, fill, table

from cinemo import s3, storage
from cinemo.data.dataset import shards
from cinemo.data.manifest.checks import text_bytes
from cinemo.data.manifest.manifest import read_manifest
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.journal import SEGMENT
from cinemo.data.precompute.plan import Plan, make_plan
from cinemo.lock import hold
from cinemo.recipes.cinemo import cinemo_tiny

ROOT = Path(__file__).resolve().parent.parent
CLIPS = 35_000_000
GROUP = 1 << 19


def write_manifest(path: Path, clips: int) -> None:
    """Ids of 16 to 20 characters in no order, uris of about 50, captions of about 60, and a typed extra column."""
    rng = np.random.default_rng(0)
    nouns = np.array(
        [
            "a dog",
            "the old boat",
            "two children",
            "a red car",
            "my neighbour",
            "some waves",
            "a tall crane",
            "the crowd",
        ]
    )
    verbs = np.array(["runs along", "drifts towards", "plays beside", "turns around", "waves at", "passes slowly over"])
    places = np.array(["a wet road", "the harbour at dusk", "an empty square", "tall green grass", "the last bridge"])
    phrases = pa.array([f"{n} {v} {p}, seen from " for n in nouns for v in verbs for p in places])
    views = pa.array(["above", "a moving train", "far away", "the other side of the river", "below"])
    writer = None
    for start in range(0, clips, GROUP):
        numbers = np.arange(start, min(start + GROUP, clips), dtype=np.uint64)
        ids = pc.cast(pa.array(numbers * np.uint64(0x9E3779B97F4A7C15)), pa.string())  # odd, so a bijection
        places_ = pc.cast(pa.array(numbers // 10_000), pa.string())
        uris = pc.binary_join_element_wise("s3://clips-of-the-world/part-", places_, "/", ids, ".mp4", "")
        captions = pc.binary_join_element_wise(
            phrases.take(pa.array(rng.integers(0, len(phrases), len(numbers)))),
            views.take(pa.array(rng.integers(0, len(views), len(numbers)))),
            ", second ",
            pc.cast(pa.array(numbers), pa.string()),
            "",
        )
        starts = np.round(rng.uniform(0, 5, len(numbers)), 2)
        table = pa.table(
            {
                "clip_id": ids,
                "uri": uris,
                "caption": captions,
                "start": starts,
                "end": starts + 10,
                "licence": pa.array(rng.integers(0, 4, len(numbers))),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_text(source: Path, path: Path) -> None:
    """The same rows as CSV or JSONL, as other programs write them."""
    file = pq.ParquetFile(source)
    if path.suffix == ".csv":
        with pyarrow.csv.CSVWriter(path, file.schema_arrow) as writer:
            for batch in file.iter_batches(GROUP):
                writer.write_batch(batch)
        return
    with path.open("wb") as lines:
        for batch in file.iter_batches(GROUP):
            parts: list[Any] = []
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                quote = '"' if pa.types.is_string(column.type) else ""
                text = pc.cast(column, pa.string())  # without anything that JSON would escape
                parts += [f'{", " if parts else "{"}"{name}": {quote}', text, quote]
            rows = pc.binary_join_element_wise(*parts, "}\n", "")
            lines.write(text_bytes(rows)[0])


def planned(manifest: Path) -> Plan:
    plan = planned_again(manifest)
    rows = plan.rows(np.arange(plan.shards))
    assert len(rows) == len(plan.clips)
    rows.slice(len(rows) // 2, 16)
    return plan


def planned_again(manifest: Path) -> Plan:
    return make_plan(read_manifest(str(manifest)), cinemo_tiny().model_copy(update={"data": DATA}))


DATA = cinemo_tiny().data.model_copy(update={"clips_per_shard": 256})


def opened(output: str, plan: Plan) -> Dataset:
    return Dataset.open(output, cinemo_tiny().model_copy(update={"data": DATA}), plan)


def stop_half_way(output: str, plan: Plan, beyond: int = 360) -> None:
    """Storage as a run leaves it that was killed half way: a journal, and ``beyond`` shards after its last segment.

    Tars and records that the journal covers are there, but empty: whoever opens one would fail.
    """
    dataset = opened(output, plan)
    dataset.load()
    dataset.begin()
    half = plan.shards // 2 // SEGMENT * SEGMENT
    record = shards.commit(output, half, [], [], dataset.fingerprint)
    for number in range(half + beyond):
        record |= {"shard": number, "samples": 250, "bytes": 250 * 165_000, "sha256": f"{number:064x}"}
        record["members"]["array_shape"] = [16, 16, 8, 12]
        if number < half:
            dataset.committed(shards.index_row(record))
            if not storage.is_remote(output):
                for uri in (shards.tar_uri(output, number), shards.record_uri(output, number)):
                    storage.local_path(uri).touch()
        else:
            members = {name: [0] * 250 for name in ("json_offset", "json_size", "array_offset")}
            record["members"] |= {"keys": [f"{k:09d}-0" for k in range(250)], **members}
            storage.write_bytes(shards.tar_uri(output, number), b"")
            storage.write_json(shards.record_uri(output, number), record)


def taken_up(output: str, manifest: Path) -> int:
    """What a restarted command does before it decodes: manifest, lock, state, rows that are left."""
    plan = planned_again(manifest)
    dataset = opened(output, plan)
    with hold(output):
        dataset.load()
        rows = plan.rows(dataset.missing_shards())
        rows.slice(0, 16)
    return int(rows.shards[0])


def closed(output: str, plan: Plan) -> None:
    """The index of as many shards as there are."""
    dataset = opened(output, plan)
    dataset.load()
    shards.index_table_bytes(dataset.journal.table())


def measured(work: Callable[[], Any]) -> tuple[tuple[float, float, float], Any]:
    """``(seconds, CPU seconds, GB at most)`` and the result, in a process of its own."""

    def child(sender: Any) -> None:
        begun, busy = time.perf_counter(), time.process_time()
        result = work()
        spent = time.perf_counter() - begun, time.process_time() - busy
        sender.send(((*spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6), result))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    result: tuple[tuple[float, float, float], Any] = receiver.recv()
    process.join()
    return result


def counted(work: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """The result, and the calls to S3 by kind."""
    calls: dict[str, int] = {}
    real = s3.call

    def call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
        calls[method] = calls.get(method, 0) + 1
        return real(uri, method, *arguments, **options)

    s3.call = call
    try:
        return work(), calls
    finally:
        s3.call = real


def on_s3(plan: Plan, manifest: Path) -> tuple[float, float, dict[str, int]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    import boto3

    boto3.client("s3").create_bucket(Bucket="cinemo-bench")
    stop_half_way("s3://cinemo-bench/out", plan)
    begun, busy = time.perf_counter(), time.process_time()
    _, calls = counted(lambda: taken_up("s3://cinemo-bench/out", manifest))
    spent = time.perf_counter() - begun, time.process_time() - busy
    server.stop()
    return *spent, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=CLIPS, help="any other number is printed only")
    parser.add_argument("--manifest", type=Path, help="use this one again, or keep it there")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        os.environ["CINEMO_CACHE"] = str(scratch / "cache")
        manifest = arguments.manifest or scratch / "manifest.parquet"
        if not manifest.exists():
            write_manifest(manifest, arguments.clips)
        rows = []

        def add(what: str, target: str, spent: tuple[float, float, float], note: str = "") -> None:
            rows.append((what, f"{spent[0]:.1f} s", f"{spent[1]:.1f} s", f"{spent[2]:.2f} GB", target, note))
            print(rows[-1], flush=True)

        def gigabytes(*paths: Path) -> str:
            return f"{sum(path.stat().st_size for path in paths) / 1e9:.1f} GB"

        planning, plan = measured(lambda: planned(manifest))
        add("Parquet: read, check and plan", "60 s, 2 GB", planning, gigabytes(manifest))
        for suffix in ("csv", "jsonl"):
            text = scratch / f"manifest.{suffix}"
            write_text(manifest, text)
            planning, same = measured(lambda text=text: planned(text))
            kept = list((scratch / "cache").rglob("*.parquet"))
            add(f"{suffix.upper()}: the same", "60 s, 2 GB", planning, f"{gigabytes(text)}, kept: {gigabytes(*kept)}")
            assert len(same.clips) == len(plan.clips)
            for path in (text, *kept):
                path.unlink()
        stop_half_way(str(scratch / "out"), plan)
        finding, first = measured(lambda: taken_up(str(scratch / "out"), manifest))
        add("taken up after a stop, local", "30 s", finding, f"{plan.shards} shards, {first} committed")
        add("the index of those shards", "", measured(lambda: closed(str(scratch / "out"), plan))[0])
        (_, _, memory), (seconds, busy, calls) = measured(lambda: on_s3(plan, manifest))
        assert not calls.keys() & {"ls", "find"}, "the bucket was listed"
        note = "requests: " + ", ".join(f"{name} {number}" for name, number in sorted(calls.items()))
        add("taken up, S3 server in the same process", "30 s", (seconds, busy, memory), note)
    finally:
        shutil.rmtree(scratch)
    text = SCALE.format(clips=f"{len(plan.clips):,}", cores=len(os.sched_getaffinity(0))) + table(HEAD, rows) + "\n"
    print(text)
    if arguments.clips == CLIPS:
        fill(SCALE_TITLE, text)


HEAD = ("what", "time", "CPU time", "memory at most", "target", "")
SCALE = """
Made with `make bench-scale`: {clips} clips, 256 a shard, {cores} cores. Memory is the peak of a separate process;
the time was taken on a machine with other work on it. CSV and JSONL are converted on the way. A stopped run has done
half of the shards; its journal covers whole thousands, and 360 records lie beyond it; taking it up means reading its
manifest again and finding what is left.

"""


if __name__ == "__main__":
    main()
