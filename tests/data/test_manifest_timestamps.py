"""Times in their usual spellings are the same seconds."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.data.manifest.manifest import read_manifest
from cinemo.data.manifest.timestamps import seconds
from cinemo.types import InputError

MS = st.integers(0, 99 * 3600_000)


def spellings(ms: int) -> list[str]:
    whole, rest = divmod(ms, 1000)
    minutes, s = divmod(whole, 60)
    h, m = divmod(minutes, 60)
    return [
        f"{ms / 1000}", f"{whole}.{rest:03d}", f"{ms / 1000}s", f"{h:02d}:{m:02d}:{s:02d}.{rest:03d}",
        f"{h}:{m:02d}:{s:02d},{rest:03d}", f"{minutes}:{s:02d}.{rest:03d}", f"PT{h}H{m}M{s}.{rest:03d}S",
        f"PT{whole}.{rest:03d}S", f"P{h // 24}DT{h % 24}H{m}M{s}.{rest:03d}S", str(datetime.timedelta(milliseconds=ms)),
        f"{h // 24} days {h % 24:02d}:{m:02d}:{s:02d}.{rest:03d}000",
    ]  # fmt: skip


@settings(max_examples=40)
@given(st.lists(MS, min_size=1, max_size=5))
def test_all_spellings_are_one_time(times: list[int]) -> None:
    for written in zip(*map(spellings, times), strict=True):
        values, bad = seconds(pa.array(written))
        assert len(bad) == 0
        assert values.to_pylist() == pytest.approx([ms / 1000 for ms in times], abs=1e-9)
    mixed, bad = seconds(pa.array(spellings(times[0])))  # each of another spelling
    assert mixed.to_pylist() == pytest.approx([times[0] / 1000] * len(mixed), abs=1e-9)


def test_arrows_own_types_are_times() -> None:
    delta, clock = datetime.timedelta(seconds=61, milliseconds=500), datetime.time(1, 0, 2, 500_000)
    for unit in ("ms", "us", "ns"):
        assert seconds(pa.array([delta, None], pa.duration(unit)))[0].to_pylist() == [61.5, None]
    assert seconds(pa.array([clock]))[0].to_pylist() == [3602.5]
    assert seconds(pa.array([1500], pa.time32("ms")))[0].to_pylist() == [1.5]


@pytest.mark.parametrize(
    "text", ["soon", "1:75", "1:75:00", "PT", "P", "-0:01", "0:01:02:03", "1,5,2", "PT1.2.3S", "٣"]
)
def test_what_is_no_time_is_found(text: str) -> None:
    values, bad = seconds(pa.array(["1:00", text, ""]))
    assert (values.to_pylist(), bad.tolist()) == ([60.0, None, None], [1])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_says_times_as_it_likes(tmp_path: Path, kind: str) -> None:
    def written(end: str) -> str:
        rows: list[dict[str, Any]] = [
            {"clip_id": "a", "uri": "u", "caption": "c", "start": "00:00:10.500", "end": "00:01:00"},
            {"clip_id": "b", "uri": "u", "caption": "c", "start": "2", "end": end},
        ]
        path = tmp_path / f"m.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif kind == "csv":
            path.write_text(
                "clip_id,uri,caption,start,end\n" + "\n".join(",".join(row.values()) for row in rows) + "\n"
            )
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    table = read_manifest(written("PT3S")).read()
    assert (table["start"].to_pylist(), table["end"].to_pylist()) == ([10.5, 2.0], [60.0, 3.0])
    with pytest.raises(InputError, match=r"row 2: end is ('later', expected|not) seconds"):
        read_manifest(written("later"))
    with pytest.raises(InputError, match="row 2: end is not after start"):
        read_manifest(written("00:01"))
