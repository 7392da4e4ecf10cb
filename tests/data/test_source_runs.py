"""Clips from everywhere through Ray: a source that fails costs its clips, never the run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.small_data import film
from faulty_s3 import FaultyS3

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex, Members, read_ledger, read_metadata, record_uri
from cinemo.data.precompute.graph import run
from cinemo.media.mp4 import write_video

pytestmark = pytest.mark.slow
ROOT = "s3://cinemo-test/everywhere"


@pytest.mark.ray
def test_clips_from_everywhere(ray_session: None, s3_faults: FaultyS3, small_recipe: Recipe, tmp_path: Path) -> None:
    write_video(tmp_path / "long.mp4", film("long", 120), 25)
    video = (tmp_path / "long.mp4").read_bytes()
    storage.write_bytes(f"{ROOT}/long.mp4", video)
    storage.write_bytes(f"{ROOT}/{'y' * 300}.mp4", video)
    with io.BytesIO() as sink, tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo("a/x.mp4")
        info.size = len(video)
        tar.addfile(info, io.BytesIO(video))
        tar.close()
        storage.write_bytes(f"{ROOT}/00000.tar", sink.getvalue())
    with io.BytesIO() as sink:
        rows = pa.table({"video": pa.array([{"bytes": video, "path": "x"}] * 3)})
        pq.write_table(rows, sink)
        storage.write_bytes(f"{ROOT}/rows.parquet", sink.getvalue())
    uris = [
        *[f"{ROOT}/long.mp4"] * 4,
        f"{ROOT}/00000.tar::a/x.mp4::512+{len(video)}",
        *[f"{ROOT}/rows.parquet::video::{row}" for row in range(2)],
        f"{ROOT}/{'y' * 300}.mp4",
        str(tmp_path / "long.mp4"),
        f"{ROOT}/gone.tar::a::0+5",
        "https://127.0.0.1:9/x.mp4",
        "s3://No such/name.mp4",
    ]
    manifest = [
        {"clip_id": str(k), "uri": uri, "caption": "x", "start": 0.5 * k if k < 4 else None}
        for k, uri in enumerate(uris)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    s3_faults.meet()
    output = str(tmp_path / "out")
    summary = run(small_recipe, str(tmp_path / "m.jsonl"), output)
    assert summary["reasons"] == {"invalid_uri": 1, "missing": 1, "unreachable": 1}
    assert summary["samples"] == 9
    gets = {request: count for request, count in s3_faults.seen.items() if "long.mp4" in request}
    assert gets == {"GET /cinemo-test/everywhere/long.mp4?": 1}
    samples = [
        sample
        for shard in DatasetIndex.load(output).shards
        for sample in read_metadata(output, shard, Members(**storage.read_json(record_uri(output, shard))["members"]))
    ]
    assert [sample["uri"] for sample in samples] == uris[:9]
    refused = {line.reason: line.uri for shard in range(3) for line in read_ledger(output, shard)}
    assert refused == {"missing": uris[9], "unreachable": uris[10], "invalid_uri": uris[11]}
    again = run(small_recipe, str(tmp_path / "m.jsonl"), output, retry_quarantine="unreachable")
    assert (again["done"], again["reasons"]["unreachable"]) == (1, 1)
