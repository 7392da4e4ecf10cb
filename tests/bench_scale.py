"""`make bench-scale`: 35,000,000 clips are read, checked and planned, and a run over them that was stopped half way is
taken up again; its part of BENCHMARKS.md. About three minutes on two cores, in 2 GB of disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
