"""Losses are sorted as a plain loop would sort them, and a report survives a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.config import Recipe
from cinemo.methods import build_method
from cinemo.training.report.metrics import COLUMNS, Losses, LossSums, Report, Window, peak_memory
from cinemo.training.run.batch import HostBatch, host_batch
from cinemo.training.run.engine import Engine
from cinemo.types import RunError
from tests.training.conftest import moving_samples

one_sample = st.tuples(
    st.floats(0, 10), st.integers(0, 999), st.integers(0, 19), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()
)


def _batch(rows: list[tuple[float, int, int, float, bool]], recipe: Recipe) -> HostBatch:
    made = host_batch(moving_samples(1) * len(rows), 0, recipe)
    _, t, buckets, _, _ = zip(*rows, strict=True)
    return replace(made, t_B=torch.tensor(t), bucket_B=torch.tensor(buckets, dtype=torch.float32))


@settings(max_examples=60)
@given(st.lists(st.lists(one_sample, min_size=1, max_size=5), min_size=1, max_size=4))
def test_means_are_those_of_a_plain_loop(parts: list[list[tuple[float, int, int, float, bool]]]) -> None:
    from cinemo.recipes import load_recipe

    recipe = load_recipe("cinemo-tiny", ["data.size=[32,32]", "data.frames=4", "model.in_channels=4"])
    sums = LossSums(1000)
    for step, rows in enumerate(parts):
        # What has no weight may be anything.
        losses = [math.nan if broken and not weight else loss for loss, _, _, weight, broken in rows]
        weights = torch.tensor([weight for _, _, _, weight, _ in rows])
        sums.add(torch.tensor(losses), _batch(rows, recipe), step, weights)
    found = sums.sums(torch.device("cpu"), len(parts)).tolist()
    made = Losses.of_sums(*found)

    rows = [row for part in parts for row in part if row[3]]

    def mean(chosen: list[tuple[float, int, int, float, bool]]) -> float:
        weight = sum(row[3] for row in chosen)
        return sum(row[0] * row[3] for row in chosen) / weight if weight else math.nan

    assert made.overall == pytest.approx(mean(rows), nan_ok=True)
    for quartile in range(4):
        there = [row for row in rows if 250 * quartile <= row[1] < 250 * (quartile + 1)]
        assert made.quartiles[quartile] == pytest.approx(mean(there), nan_ok=True)
    buckets = {row[2] for row in rows}
    assert made.buckets == {k: pytest.approx(mean([row for row in rows if row[2] == k])) for k in buckets}
    for step, part in enumerate(parts):
        assert found[0][25 + step] == pytest.approx(sum(row[0] * row[3] for row in part if row[3]))


def test_a_report_survives_a_checkpoint() -> None:
    report = Report(7, 0.5, 1e-3, 2.0, 8.0, 0.25, mfu=0.4, loss_t2=0.1, buckets={"loss_bucket_03": 0.2})
    kept = json.loads(json.dumps(report.kept(), allow_nan=False))
    again = Report.of_kept(kept)
    assert again.kept() == report.kept()
    assert (again.step, again.mfu, again.buckets) == (7, 0.4, {})
    assert math.isnan(again.val_loss)
    assert Report.of_kept([3, 0.5, 1e-3, 2.0, 8.0, 0.25]).loss == 0.5  # of a version that knew no more
    assert report.metrics() == {
        "loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "samples_per_second": 8.0, "data_wait": 0.25, "mfu": 0.4,
        "loss_t2": 0.1, "loss_bucket_03": 0.2,
    }  # fmt: skip
    checked = report.validated(Losses(0.9, (0.1, 0.2, 0.3, math.nan), {4: 0.5}))
    assert (checked.val_loss, checked.val_loss_t1, checked.loss_t2) == (0.9, 0.2, 0.1)
    assert checked.buckets == {"loss_bucket_03": 0.2, "val_loss_bucket_04": 0.5}
    assert COLUMNS[0] == "step"
    assert "buckets" not in COLUMNS


@pytest.mark.usefixtures("process_group")
def test_a_window(small: Recipe) -> None:
    engine = Engine(build_method(small), small.train, torch.device("cpu"))
    window = Window(engine, small, sample_seconds=1e-9)
    samples = moving_samples(4)
    losses, batches = [], []
    for step in range(3):
        for start in (0, 2):
            batches.append(host_batch(samples[start : start + 2], step, small))
            losses.append(torch.tensor([1.0, 2.0]) * (step + 1))
            window.add(losses[-1], batches[-1])
        window.end_step(8 + step, moved=True)
    report = window.close(10, 0.5)
    assert (report.step, report.loss, report.lr) == (10, pytest.approx(3.0), 0.5)
    t = torch.cat([batch.t_B for batch in batches])
    flat = torch.cat(losses)
    for quartile, value in enumerate((report.loss_t0, report.loss_t1, report.loss_t2, report.loss_t3)):
        there = flat[(t >= 250 * quartile) & (t < 250 * (quartile + 1))]
        assert value == pytest.approx(float(there.mean()), nan_ok=True)
    names = [f"loss_bucket_{int(bucket):02d}" for batch in batches[:2] for bucket in batch.bucket_B]
    assert len(set(names)) == 4  # each sample's own; the first of each pair has half the loss of the second
    assert report.buckets == {name: pytest.approx(mean) for name, mean in zip(names, (2.0, 4.0) * 2, strict=True)}
    assert report.mfu == pytest.approx(report.samples_per_second * 1e-9)
    impossible = Window(engine, small, 1e9)
    impossible.add(torch.tensor([1.0, 2.0]), batches[0])
    impossible.end_step(8, moved=True)
    assert math.isnan(impossible.close(9, 0.5).mfu)
    assert 0 < report.memory_gb <= peak_memory(engine.device) / 1e9

    window.add(torch.tensor([1.0, 1.0]), batches[0])
    window.end_step(11, moved=True)
    window.add(torch.tensor([1.0, math.inf]), batches[0])
    window.end_step(12, moved=False)
    report = window.close(12, 0.5)
    assert (report.loss, report.skipped_steps, report.unmoved) == (1.0, 1, {12: batches[0].keys[1:]})
    window.add(torch.tensor([1.0, 1.0]), batches[0])
    window.end_step(13, moved=False)
    report = window.close(13, 0.5)
    assert report.unmoved == {13: batches[0].keys}, "where every loss is finite, all are to blame"
    assert math.isnan(report.loss)

    window.add(torch.tensor([1.0, math.inf]), batches[0])
    window.end_step(14, moved=True)
    with pytest.raises(RunError, match="step 14: the loss is inf; resume"):
        window.close(14, 0.5)


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    assert 5e7 < before < 1e11
    held = np.ones(int(before) // 8 + 30_000_000)  # more than there ever was
    assert peak_memory(torch.device("cpu")) > before + 1e8
    del held
    assert peak_memory(torch.device("cpu")) > before + 1e8
