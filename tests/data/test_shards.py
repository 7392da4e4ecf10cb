"""Shards: deterministic bytes that tar and webdataset read, records that find every member, honest indexes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from blake3 import blake3
from data.small_data import LATENT_SHAPE, make_dataset, make_sample

from cinemo import storage
from cinemo.cache import Damaged, FileCache
from cinemo.checksums import algorithm_of, checksum, recorded
from cinemo.data.dataset.shards import (
    DatasetIndex,
    Members,
    commit,
    encode_tar,
    fetch_sample,
    index_bytes,
    index_table,
    index_table_bytes,
    read_ledger,
    read_metadata,
    read_sample,
)
from cinemo.types import InputError, LatentSample, Refusal


def tar_bytes(samples: list[LatentSample]) -> bytes:
    return b"".join(encode_tar(samples)[0])


def test_equal_samples_give_equal_bytes() -> None:
    samples = [make_sample(k) for k in range(3)]
    assert tar_bytes(samples) == tar_bytes([make_sample(k) for k in range(3)])


def test_bytes_are_those_of_tarfile_and_numpy() -> None:
    samples = [make_sample(k) for k in range(3)]
    file, data = io.BytesIO(), tar_bytes(samples)
    with tarfile.open(fileobj=io.BytesIO(data)) as ours, tarfile.open(fileobj=file, mode="w") as theirs:
        theirs.format = tarfile.USTAR_FORMAT
        for member in ours:
            content = ours.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".npy"):
                saved = io.BytesIO()
                np.save(saved, samples[int(member.name[:9])].latents_FCHW)
                content = saved.getvalue()
            info = tarfile.TarInfo(member.name)
            info.size = len(content)
            theirs.addfile(info, io.BytesIO(content))
    assert data == file.getvalue()[: len(data)]


def test_tarfile_reads_a_shard() -> None:
    data = tar_bytes([make_sample(k) for k in range(3)])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames()[:3] == ["000000000-0.json", "000000000-0.latents.npy", "000000001-0.json"]
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o644)}
        array = np.load(io.BytesIO(tar.extractfile("000000002-0.latents.npy").read()))  # type: ignore[union-attr]
        np.testing.assert_array_equal(array, make_sample(2).latents_FCHW)
        metadata = json.loads(tar.extractfile("000000002-0.json").read())  # type: ignore[union-attr]
    assert set(metadata) >= {"clip_id", "uri", "caption", "fps", "frame_interval", "start_frame", "ssim", "view"}
    assert metadata["ssim"] == make_sample(2).ssim


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    make_dataset(tmp_path, [5])
    dataset = webdataset.WebDataset(str(tmp_path / "shards/shard-000000.tar"), shardshuffle=False).decode()
    read = list(dataset)
    assert [entry["__key__"] for entry in read] == [f"{k:09d}-0" for k in range(5)]
    for k, entry in enumerate(read):
        assert entry["json"]["caption"] == f"caption {k}"
        np.testing.assert_array_equal(entry["latents.npy"], make_sample(k).latents_FCHW)


def test_one_sample_by_its_offsets() -> None:
    pieces, members = encode_tar([make_sample(k) for k in range(4)])
    sample = read_sample(memoryview(b"".join(pieces)), members, 2)
    np.testing.assert_array_equal(sample.latents_FCHW, make_sample(2).latents_FCHW)
    assert (sample.key, sample.clip_id, sample.ssim) == ("000000002-0", "clip.2/ü", make_sample(2).ssim)


def test_parts_of_a_shard_on_storage(tmp_path: Path) -> None:
    record = commit(str(tmp_path), 0, [make_sample(k) for k in range(4)], [], "f")
    members = Members(**record["members"])
    assert [entry["caption"] for entry in read_metadata(str(tmp_path), 0, members)] == [
        f"caption {k}" for k in range(4)
    ]
    sample = fetch_sample(str(tmp_path), 0, members, 3)
    np.testing.assert_array_equal(sample.latents_FCHW, make_sample(3).latents_FCHW)
    assert (sample.key, sample.start_frame, sample.fields) == ("000000003-0", 3, {})


def test_samples_of_unequal_shape_are_a_bug() -> None:
    samples = [make_sample(0), make_sample(1)]
    object.__setattr__(samples[1], "latents_FCHW", np.zeros((6, 4, 4, 7), np.float16))
    with pytest.raises(ValueError, match="one shape"):
        encode_tar(samples)


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_record_says_what_is_there(tmp_path: Path, algorithm: str) -> None:
    refusals = [Refusal("x", "x.mp4", "open", "missing", "gone"), Refusal("y", "y.mp4", "open", "missing", "gone")]
    samples = [make_sample(k) for k in range(3)]
    record = commit(str(tmp_path), 7, samples, refusals, "f", checksum=algorithm)
    assert record == json.loads((tmp_path / "shards/shard-000007.json").read_bytes())
    tar = (tmp_path / "shards/shard-000007.tar").read_bytes()
    assert record["bytes"] == len(tar)
    if algorithm == "sha256":
        assert record["sha256"] == hashlib.sha256(tar).hexdigest()
    else:
        assert record["checksum"] == f"blake3:{blake3(tar).hexdigest()}"
    assert ("sha256" in record) != ("checksum" in record)
    assert (record["samples"], record["quarantined"], record["reasons"]) == (3, 2, {"missing": 2})
    assert record["ssim"]["sum"] == pytest.approx(sum(sample.ssim for sample in samples))
    assert sum(record["ssim"]["histogram"]) == 3
    assert record["members"]["array_shape"] == list(LATENT_SHAPE)
    assert read_ledger(str(tmp_path), 7) == refusals


def test_a_shard_in_which_all_clips_were_refused(tmp_path: Path) -> None:
    record = commit(str(tmp_path), 0, [], [Refusal("x", "x.mp4", "open", "missing", "gone")], "f")
    assert (record["samples"], record["ssim"]["min"]) == (0, None)
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as tar:
        assert tar.getnames() == []


def test_ledger_of_an_earlier_attempt_goes(tmp_path: Path) -> None:
    commit(str(tmp_path), 0, [], [Refusal("x", "x.mp4", "open", "missing", "gone")], "f")
    commit(str(tmp_path), 0, [make_sample(0)], [], "f")
    assert not (tmp_path / "quarantine/shard-000000.jsonl").exists()


def test_index_of_a_finished_dataset(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [3, 0, 4])
    assert index.shards == [0, 1, 2]
    assert index.samples_of_shards.tolist() == [3, 0, 4]
    assert index.ssim_histogram.sum() == 7
    place = np.flatnonzero(index.ssim_histogram)[0]
    assert place == int(min(make_sample(k).ssim for k in range(7)) * 1000)


@pytest.mark.parametrize(("algorithm", "column"), [("blake3", "checksum"), ("sha256", "sha256")])
def test_an_index_says_which_checksums_it_has(tmp_path: Path, algorithm: str, column: str) -> None:
    """That of sha256 is what it was before there was a choice, byte for byte."""
    records = [commit(str(tmp_path), k, [make_sample(k)], [], "f", checksum=algorithm) for k in range(2)]
    content = index_bytes(records)
    table = pq.read_table(io.BytesIO(content))
    assert table[column].to_pylist() == [record[column] for record in records]
    assert table.column_names[5] == column
    assert index_table(content)["checksum"].to_pylist() == [record[column] for record in records]
    assert index_table_bytes(index_table(content)) == content


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_damage_is_found_by_either_checksum(tmp_path: Path, algorithm: str) -> None:
    record = commit(str(tmp_path), 0, [make_sample(0)], [], "f", checksum=algorithm)
    place, written = tmp_path / "shards/shard-000000.tar", recorded(record)
    cache = FileCache(1e9)
    assert len(cache.map(str(place), written, record["bytes"])) == record["bytes"]
    place.write_bytes(bytes(record["bytes"]))
    with pytest.raises(Damaged, match=rf"has {algorithm} \w+\.\.\., its record says {algorithm} "):
        cache.map(str(place), written, record["bytes"])


def test_an_unknown_checksum_is_named() -> None:
    with pytest.raises(InputError, match=r"checksum algorithm 'md5': unknown here, expected blake3 or sha256"):
        checksum([b""], algorithm_of("md5:00"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, "not complete; run the same precompute.py command"),
        ({"schema": 99}, "has format 99, this version of cinemo reads up to 1; update cinemo"),
        ({"schema": None}, "is no record of a dataset"),
        ({"samples": 0}, "has no samples: all 1 clips were refused"),
    ],
)
def test_unusable_datasets_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    make_dataset(tmp_path, [2])
    place = str(tmp_path / "dataset.json")
    storage.write_json(place, storage.read_json(place) | change)
    with pytest.raises(InputError, match=message):
        DatasetIndex.load(str(tmp_path))


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset there"):
        DatasetIndex.load(str(tmp_path / "nowhere"))
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        DatasetIndex.load(str(tmp_path))
