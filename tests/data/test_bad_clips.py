"""Every kind of bad clip through Ray: the run ends by itself, those clips are in the ledger, the others in shards."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data.small_data import film

from cinemo.config import DataConfig, Recipe
from cinemo.data.dataset.shards import read_ledger
from cinemo.data.precompute import graph as precompute
from cinemo.data.precompute import stages
from cinemo.media.mp4 import write_video
from cinemo.recipes import override

pytestmark = pytest.mark.slow


@pytest.mark.ray
def test_crashes_and_hangs_end_in_quarantine(
    ray_session: None, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clips"
    write_video(folder / "film.mp4", film("a", 30), 25)
    for name in ("a.segfault", "b.good", "c.hang", "d.good", "e.raises"):
        (folder / name).write_bytes(b"x")
    rows = [{"clip_id": path.name, "uri": str(path), "caption": "a film"} for path in sorted(folder.iterdir())]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = str(Path(__file__).resolve().parents[1])

    def decode_and_score(clips: pa.Table, data: DataConfig, meter: Any) -> pa.Table:
        if tests not in sys.path:  # in a Ray worker
            sys.path.append(tests)
        from media import broken_decoders

        return stages.score(stages.decode(clips, data, broken_decoders.decode), data)

    monkeypatch.setattr(precompute, "_decode_and_score", decode_and_score)
    recipe = override(small_recipe, ["data.clip_timeout=5", "data.clips_per_shard=3"])
    begun = time.monotonic()
    summary = precompute.run(recipe, str(tmp_path / "manifest.jsonl"), str(tmp_path / "out"))
    assert time.monotonic() - begun < 120
    assert summary["reasons"] == {"decoder_crash": 1, "decoder_hang": 1, "decoder_error": 1}
    assert (summary["samples"], summary["quarantined"]) == (3, 3)
    lines = [line for shard in range(2) for line in read_ledger(str(tmp_path / "out"), shard)]
    assert {line.clip_id: (line.stage, line.reason) for line in lines} == {
        "a.segfault": ("decode", "decoder_crash"),
        "c.hang": ("decode", "decoder_hang"),
        "e.raises": ("decode", "decoder_error"),
    }
