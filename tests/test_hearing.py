"""What counts as a stray line, by lines that were on the terminal once and lines that belong there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hearing import STRAY, listen


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-30 01:27:00,103 E 945 945] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches)'",
        "2026-11-30 01:27:00,103\tINFO worker.py:1832 -- Started a local Ray instance.",
        "(RayTrainWorker pid=1234) Setting up process group",
        "/usr/lib/python3/site-packages/torch/x.py:12: FutureWarning: is deprecated",
        "INFO:alembic.runtime.migration:Context impl SQLiteImpl.",
        "Running 0:  10%|#         | 1/10 [00:01<00:09,  1.02it/s]",
        "out.mp4: 16 frames, {'recipe': 'cinemo-tiny', 'bundle': '4b25'}",
        "motion control (rank correlation of value and motion): None",
    ],
)
def test_stray(line: str) -> None:
    assert STRAY.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "10/10 clips in 1/1 shards, 0.68 clips/s, 0.4 MB/s, 0:00:51 gone, 0:00:00 left, busy: decode 14% encode 89%",
        "step 5/6  loss 0.0600  lr 5.00e-05  5.0 samples/s  mfu 33%  data wait 1%  0:00:42 gone, 0:00:43 left",
        "6 steps, loss 0.0600 -> 0.1507, 6.2 samples/s; checkpoint: /tmp/run/checkpoint_2026-11-30_01-32-28.061407",
        "mlflow ui --backend-store-uri sqlite:////tmp/demo/run/mlflow.db",
        "  python pipelines/serve.py --bundle demo/bundle",
    ],
)
def test_not_stray(line: str) -> None:
    assert not STRAY.search(line)


def test_silences_are_measured_from_start_to_end(tmp_path: Path) -> None:
    code = "import time\nprint('first', flush=True)\ntime.sleep(0.6)\nprint('second')"
    heard = listen([sys.executable, "-c", code], tmp_path, {}, 60)
    assert (heard.code, heard.text) == (0, "first\nsecond")
    silent, after = heard.longest_silence()
    assert silent >= 0.6 or after == "(start)"
    assert listen([sys.executable, "-c", "while True: pass"], tmp_path, {}, 0.5).code == -9
