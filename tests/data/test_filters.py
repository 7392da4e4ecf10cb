"""A filter is parsed, never run; it says what is seen of a dataset, whatever is stored of its samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_data import make_sample
from hypothesis import given
from hypothesis import strategies as st

from cinemo import storage
from cinemo.data.dataset import columns, filters, shards
from cinemo.data.dataset.filters import parse, select
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.types import InputError, LatentSample

SIZES = (3, 5, 2)
EXTRAS: list[dict[str, Any]] = [
    {"aesthetic": k if k % 3 else k + 0.5, "tag": "a'b" if k % 2 else None, "cut": k == 4, "odd-name": k, "lists": [k]}
    for k in range(sum(SIZES))
]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetIndex:
    """Ten samples with columns of their own; the last shard is of another manifest, with a column more."""
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    return write(tmp_path / "data")


def write(root: Path, with_columns: bool = True) -> DatasetIndex:
    records, position = [], 0
    for shard, size in enumerate(SIZES):
        samples = [with_extra(k, {"later": "x"} if shard == 2 else {}) for k in range(position, position + size)]
        if with_columns:
            columns.write(str(root), shard, [shards.sample_metadata(sample) for sample in samples], [])
        records.append(shards.commit(str(root), shard, samples, [], "f" * 64))
        position += size
    storage.write_bytes(str(root / "index.parquet"), shards.index_bytes(records))
    info = {"schema": shards.SCHEMA_VERSION, "complete": True, "samples": position, "quarantined": 0}
    storage.write_json(str(root / "dataset.json"), info)
    return DatasetIndex.load(str(root))


def with_extra(position: int, more: dict[str, Any]) -> LatentSample:
    return replace(make_sample(position), extra=EXTRAS[position] | more)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("aesthetic > 4.5", [5, 6, 7, 8, 9]),
        ("aesthetic >= 4 AND NOT aesthetic > 6.5 OR aesthetic = 1", [1, 4, 5, 6]),
        ("2 < aesthetic <= 4", [3, 4]),
        ('tag == "a\'b"', [1, 3, 5, 7, 9]),
        ("tag is null and cut = false", [0, 2, 6, 8]),
        ("tag IS NOT NULL", [1, 3, 5, 7, 9]),
        ("cut", [4]),
        ("`odd-name` * 2 + 1 > 15", [8, 9]),
        ("aesthetic in (1, 4, 99)", [1, 4]),
        ("aesthetic <> 1 and aesthetic not in (2, 4) and aesthetic < -1 + 6", [0, 3]),
        ("'ption 7' in caption", [7]),
        ("'caption' not in caption or start_frame = 2", [2]),
        ("later = 'x'", [8, 9]),
    ],
)
def test_what_passes(index: DatasetIndex, where: str, expected: list[int]) -> None:
    assert np.flatnonzero(select(index, where)).tolist() == expected


def test_any_number_of_clips_can_be_named(index: DatasetIndex) -> None:
    named = ", ".join(f"'{name}'" for name in ["a'b".replace("'", "\\'"), *map(str, range(20_000))])
    assert np.flatnonzero(select(index, f"tag in ({named})")).tolist() == [1, 3, 5, 7, 9]
    with pytest.raises(InputError, match="none of the 10 samples"):  # nor does null pass
        select(index, f"tag not in ({named})")


def test_scores_and_the_cache(index: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [make_sample(k).ssim for k in range(sum(SIZES))]
    expected = [score < 0.6 for score in scores]
    assert select(index, "ssim < 0.6").tolist() == expected
    monkeypatch.setattr(filters, "_columns", None)  # not read again
    assert select(index, "ssim < 0.6").tolist() == expected


def test_older_datasets_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    index = write(tmp_path / "data", with_columns=False)
    assert np.flatnonzero(select(index, "aesthetic > 7")).tolist() == [8, 9]
    assert not (tmp_path / "data/columns").exists()
    monkeypatch.setattr(shards, "read_metadata", None)  # not read again
    assert np.flatnonzero(select(index, "later = 'x' and aesthetic > 8")).tolist() == [9]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aesthetics > 1", r"no column aesthetics in .*; it has aesthetic, caption, clip_id, cut, .*odd-name.*, view$"),
        ("lists > 1", "no column lists"),
        ("ssim < 'high'", r"cannot be computed \(ssim is double\)"),
        ("caption", r"cannot be computed \(caption is string\)"),
        ("ssim < 0", "none of the 10 samples .* passes"),
        ("ssim <", "not an expression over columns"),
        ("", "not an expression over columns"),
        ("1 < 2", "it names no column"),
        ("__import__('os').system('true')", "is not allowed"),
        ("ssim.__class__ < 1", "is not allowed"),
        ("(lambda: ssim)()", "'lambda' is a word of Python"),
        ("[x for x in caption]", "'for' is a word of Python"),
        ("ssim < 1; ssim > 0", "not an expression"),
        ("ssim is 1", "after 'is' only null can stand"),
        ("ssim in caption", "'in' is for a column and values"),
        ("ssim ** 9", "is not allowed"),
        ("ssim < " + "9" * 30, "'9{30}' is no number of 64 bits"),
        ("ssim in (a, 1)", "behind 'in', expected numbers or texts"),
        ("ssim in ('a', 'b')", r"cannot be computed \(ssim is double\)"),
        ("caption = '\\ud800'", "no text that a column can hold"),
        ("caption = '\udcff'", "not an expression over columns"),
        ("__column_5__ < 1", "no column __column_5__"),
        ("(" * 10_000 + "ssim" + ")" * 10_000, r"^.{,500}$"),
        ("not " * 10_000 + "ssim < 1", r"^.{,500}$"),
        (" and ".join(["ssim < 1"] * 10_000), "it has 19999 parts, expected at most 500"),
        (f"aesthetic in ({', '.join(map(str, range(10_000)))})", "it has 10001 parts, expected at most 500"),
    ],
)
def test_what_is_no_filter_is_refused_in_one_line(index: DatasetIndex, where: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        select(index, where)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("--where ")


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    refused = ""
    try:
        assert parse(text)[1]
    except InputError as error:
        refused = str(error)
    assert "\n" not in refused
