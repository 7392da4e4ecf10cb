"""A training survives what kills it: the whole job, or one worker; and refuses what does not fit together."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cinemo import lock, storage
from cinemo.bundle import save_bundle
from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.filters import select
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.data.loading.source import Source
from cinemo.media.motion import STILLER
from cinemo.methods import build_method
from cinemo.methods.cinemo import CinemoTrain
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.weights import save_network
from cinemo.recipes import override
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log
from cinemo.training.report.progress import SUMMARY_FILE
from cinemo.training.run import worker
from cinemo.training.run.base_weights import base_networks, check_base
from cinemo.training.run.dataset_check import dataset_digest
from cinemo.training.run.starting import Start, starting_point
from cinemo.types import InputError, keyed_seed
from tests.training.conftest import moving_samples, sizes
from tests.training.jobs import PATIENCE, STEPS, Job, reference, two_workers

pytestmark = pytest.mark.slow


@pytest.mark.ray
@pytest.mark.usefixtures("process_group")
def test_a_killed_job_and_a_killed_worker_leave_the_curve_as_it_is(
    small: Recipe, dataset: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe, output = two_workers(small), tmp_path / "run"
    # The first job runs on one worker, at another ZeRO stage: its checkpoint is everyone's.
    begun = {"workers": 1, "micro_batch": 2, "zero_stage": 3}
    first = recipe.model_copy(update={"train": CinemoTrain(**(recipe.train.model_dump() | begun))})
    jobs.append(Job(first, dataset, output, tmp_path / "first.log"))
    jobs[0].wait_for(lambda: bool(checkpoints.complete(str(output))))
    with pytest.raises(InputError, match=rf"another job is working on it \(.*process {jobs[0].process.pid}") as refused:
        worker.run(recipe, dataset, str(output))
    assert "\n" not in str(refused.value)
    jobs[0].kill_all()
    assert (output / lock.NAME).exists()
    run = json.loads((output / "run.json").read_text())
    assert not (output / SUMMARY_FILE).exists()
    reached = checkpoints.latest(str(output))
    assert reached is not None
    assert reached.step < STEPS
    orphan = output / checkpoints.RUN / "checkpoint_2030-01-01_00-00-00.000001"
    orphan.mkdir()

    jobs.append(Job(recipe, dataset, output, tmp_path / "second.log"))
    jobs[1].wait_for(lambda: any(card.step > reached.step for card in checkpoints.complete(str(output))))
    assert not orphan.exists()
    jobs[1].kill_a_worker()
    assert jobs[1].process.wait(PATIENCE) == 0, jobs[1].log.read_text()
    log = jobs[1].log.read_text()
    assert f"continuing at step {reached.step}" in log
    assert "watching" not in log, "a dead holder on this machine is followed at once"
    assert not (output / lock.NAME).exists()
    assert log.count("continuing at step") == 2, log

    summary = json.loads((output / SUMMARY_FILE).read_text())
    assert (summary["steps"], summary["start_step"]) == (STEPS, reached.step)
    if run["mlflow_run"]:  # the first job may have been killed before MLflow was up
        assert summary["mlflow_run"] == run["mlflow_run"]
    with (output / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    losses = [float(row["loss"]) for row in rows]
    alone = reference(recipe, dataset)
    assert losses == pytest.approx([report.loss for report in alone], rel=1e-3)
    assert [row["step"] for row in rows if row["val_loss"]] == ["8", "16", "24"]
    for row, report in zip(rows, alone, strict=True):
        for name in ("loss_t0", "loss_t3", "val_loss", "val_loss_t1"):
            got = float(row[name] or "nan")
            assert got == pytest.approx(getattr(report, name), rel=1e-3, nan_ok=True), (row["step"], name)
        assert 0 < float(row["mfu"]) < 1
        assert 0.1 < float(row["memory_gb"]) < 100
    assert summary["val_loss"] == pytest.approx(float(rows[-1]["val_loss"]))
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    kept = checkpoints.complete(str(output))
    assert (kept[-1].step, len(kept)) == (STEPS, recipe.train.keep_checkpoints)
    assert (output / "samples" / f"step-{STEPS:06d}.png").exists()
    assert len(list((output / "samples" / f"step-{STEPS:06d}").glob("*.mp4"))) == 4

    client = MlflowClient(summary["mlflow_uri"])
    for name in ("loss", "grad_norm", "loss_bucket_02", "val_loss"):
        steps = [metric.step for metric in client.get_metric_history(summary["mlflow_run"], name)]
        assert len(steps) == len(set(steps)), name
    assert [m.step for m in client.get_metric_history(summary["mlflow_run"], "loss")] == list(range(1, STEPS + 1))
    (used,) = client.get_run(summary["mlflow_run"]).inputs.dataset_inputs
    assert used.dataset.digest == dataset_digest(DatasetIndex.load(dataset))

    again = worker.run(recipe, dataset, str(output))
    assert again.steps == STEPS


@pytest.mark.ray
def test_an_interrupt_ends_in_130_and_the_run_goes_on_later(
    small: Recipe, dataset: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    endless = small.model_copy(update={"train": small.train.model_copy(update={"max_steps": 100_000})})
    jobs.append(Job(endless, dataset, tmp_path / "run", tmp_path / "first.log"))
    jobs[0].wait_for(lambda: "loss" in jobs[0].log.read_text())
    jobs[0].process.send_signal(signal.SIGINT)
    assert jobs[0].process.wait(PATIENCE) == 130, jobs[0].log.read_text()
    assert "Traceback" not in jobs[0].log.read_text()


@pytest.mark.release
@pytest.mark.ray
def test_a_training_that_lost_its_output_stops_and_writes_nothing_more(
    small: Recipe, dataset: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    endless = small.model_copy(update={"train": small.train.model_copy(update={"max_steps": 100_000})})
    output = tmp_path / "run"
    jobs.append(Job(endless, dataset, output, tmp_path / "first.log"))
    jobs[0].wait_for(lambda: "loss" in jobs[0].log.read_text())
    storage.write_json(str(output / lock.NAME), {"host": "far-away", "pid": 7})
    assert jobs[0].process.wait(PATIENCE) == 1, jobs[0].log.read_text()
    last = jobs[0].log.read_text().splitlines()[-1]
    assert f"{output}: this job has lost its lock (host far-away, process 7" in last
    assert storage.read_json(str(output / lock.NAME))["host"] == "far-away"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of a given number of bytes, for this test alone."""
    made: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{len(made)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.release
@pytest.mark.ray
def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_is_usable(
    small: Recipe,
    dataset: str,
    tmp_path: Path,
    jobs: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    tiny_disk: Callable[[int], Path],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    size = 12 * sum(value.numel() for value in build_method(small).parameters())  # weights and two moments
    output = tiny_disk(round(2.5 * size)) / "run"
    settings = {"max_steps": 6, "checkpoint_every": 2, "sample_every": 0, "keep_checkpoints": 3}
    recipe = small.model_copy(update={"train": CinemoTrain(**(small.train.model_dump() | settings))})
    jobs.append(Job(recipe, dataset, output, tmp_path / "first.log"))
    assert jobs[0].process.wait(PATIENCE) == 1, jobs[0].log.read_text()
    log = jobs[0].log.read_text()
    assert f"{output}: no space left for the checkpoint of step 6" in log.splitlines()[-1]
    assert "--resume auto" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert [card.step for card in checkpoints.complete(str(output))] == [2, 4]
    assert len(checkpoints.stored(str(output))) == 2, "what was left half written is swept"

    frugal = recipe.model_copy(update={"train": recipe.train.model_copy(update={"keep_checkpoints": 1})})
    jobs.append(Job(frugal, dataset, output, tmp_path / "second.log"))
    assert jobs[1].process.wait(PATIENCE) == 0, jobs[1].log.read_text()
    assert "continuing at step 4" in jobs[1].log.read_text()
    assert [card.step for card in checkpoints.complete(str(output))] == [6]


def base_unet(recipe: Recipe) -> LavieUNet | None:
    networks = base_networks(recipe)
    return None if networks is None else networks["unet"]


def test_base_weights_are_where_training_begins(small: Recipe, tmp_path: Path) -> None:
    unet = LavieUNet(**small.model.model_dump())
    save_network(unet.half(), tmp_path)
    begun = base_unet(override(small, [f"train.init={tmp_path}"]))
    assert begun is not None
    assert begun.dtype == torch.float32
    for name, value in begun.named_parameters():
        torch.testing.assert_close(value, unet.get_parameter(name).float(), rtol=0, atol=0)
    wider = override(small, [f"train.init={tmp_path}", "model.block_out_channels=[32,96]"])
    with pytest.raises(InputError, match=r"train\.init: .*do not fit.*train\.init=null trains from scratch"):
        base_unet(wider)


def test_lavie_cinemo_or_nothing_is_where_training_begins(small: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(1)
    unet = LavieUNet(**small.model.model_dump())
    state = unet.state_dict()

    lavie = {name: value for name, value in state.items() if not name.startswith("add_embedding.")}
    torch.save({"ema": lavie}, tmp_path / "lavie_base.pt")
    torch.manual_seed(keyed_seed(0, "weights"))
    begun = base_unet(override(small, [f"train.init={tmp_path / 'lavie_base.pt'}"]))
    assert begun is not None
    for name, value in lavie.items():
        assert torch.equal(begun.state_dict()[name], value), name
    assert not begun.add_embedding.linear_2.weight.any()
    torch.manual_seed(keyed_seed(0, "weights"))
    again = base_unet(override(small, [f"train.init={tmp_path / 'lavie_base.pt'}"]))
    assert again is not None
    assert torch.equal(again.add_embedding.linear_1.weight, begun.add_embedding.linear_1.weight)

    save_bundle(tmp_path / "bundle", small, {"unet": unet}, {})
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").rglob("*") if path.is_file()} == {0o644}
    save_network(unet, tmp_path / "published" / "unet")
    for folder in ("bundle", "published", "published/unet"):
        begun = base_unet(override(small, [f"train.init={tmp_path / folder}"]))
        assert begun is not None
        for name, value in state.items():
            assert torch.equal(begun.state_dict()[name], value), (folder, name)

    assert base_unet(override(small, ["train.init=null"])) is None
    for folder in ("bundle", "bundle/unet", "bundle/unet/", "published", "lavie_base.pt", "nowhere"):
        init = f"train.init={tmp_path}/{folder}"
        assert check_base(override(small, [init])) is None
        if folder.startswith("bundle"):
            other = override(small, [init, "diffusion.prediction=epsilon"])
            with pytest.raises(InputError, match=r"its network predicts v, .*--set diffusion\.prediction=v "):
                check_base(other)
    save_bundle(tmp_path / "stiller", small, {"unet": unet}, {}, STILLER)
    note = check_base(override(small, [f"train.init={tmp_path / 'stiller'}"]))
    assert note is not None
    assert "100 x SSIM, larger = stiller" in note
    torch.save({"optimizer": [1]}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    for place, words in (
        ("nowhere", "no such file or directory"),
        ("empty", "no UNet weights there, expected .*safetensors.*, or a folder with unet/"),
        ("other.pt", "expected a table of tensors"),
    ):
        with pytest.raises(
            InputError, match=rf"train\.init: .*{words}.*train\.init=null trains from scratch"
        ) as caught:
            base_unet(override(small, [f"train.init={tmp_path / place}"]))
        assert "\n" not in str(caught.value)


@pytest.fixture
def stored(small: Recipe, dataset: str, tmp_path: Path) -> Path:
    """A run directory with a checkpoint of step 3."""
    directory = tmp_path / "run" / checkpoints.RUN / "checkpoint_2030-01-01_00-00-00.000001"
    (directory / "state").mkdir(parents=True)
    (directory / "state" / "weights.pt").write_bytes(b"weights")
    digest = dataset_digest(DatasetIndex.load(dataset))
    checkpoints.describe(directory, small, 3, 1, digest, sizes(directory))
    return tmp_path / "run"


def test_what_does_not_fit_is_refused_before_anything_starts(
    small: Recipe, dataset: str, stored: Path, tmp_path: Path
) -> None:
    def changed(**train_keys: object) -> Recipe:
        return small.model_copy(update={"train": CinemoTrain(**(small.train.model_dump() | train_keys))})

    def refused(
        words: str,
        recipe: Recipe = small,
        data: str = dataset,
        output: Path = stored,
        resume: str = "auto",
        change_batch: bool = False,
    ) -> None:
        with pytest.raises(InputError, match=words) as caught:
            worker.run(recipe, data, str(output), resume, change_batch=change_batch)
        assert "\n" not in str(caught.value)

    refused("already holds a run; continue it with --resume auto", resume="never")
    refused("already holds a run", resume=str(stored))
    refused(r"cannot continue with another train\.precision fp32 -> bf16;", changed(precision="bf16"))
    larger = changed(workers=2, micro_batch=1, global_batch=8)
    refused(r"train\.global_batch 4 -> 8; use .*recipe\.json\), or --change-batch", larger)
    refused(r"train\.lora_rank 16 -> 4; use .*recipe\.json\)$", changed(global_batch=8, lora_rank=4), change_batch=True)
    refused(r"train\.held_out_shards 0 -> 1;", changed(held_out_shards=1))
    refused(r"train\.trainable all -> lora", changed(trainable="lora"))
    refused(r"train\.lora_rank 16 -> 4", changed(lora_rank=4))
    refused(
        r"has done 3 steps, so train\.skip_steps 2-3 cannot be passed over any more", changed(skip_steps=("2-3", "3-4"))
    )
    refused(
        r"has done 3 steps, so train\.skip_steps 2-3 cannot be passed over any more", changed(skip_steps=("2-3", "3-4"))
    )
    refused("checkpoint .*elsewhere: none there", output=tmp_path / "new", resume=str(tmp_path / "elsewhere"))
    refused("no dataset there", data=str(tmp_path))
    with lock.hold(str(tmp_path / "held")):
        refused(rf"another job is working on it \(.*process {os.getpid()}, since", output=tmp_path / "held")
    refused(r"cannot write there \(File name too long\)", output=tmp_path / ("long" * 100))
    refused("name ends with 'to_qq'; did you mean", changed(trainable="lora", lora_layers=("to_qq",)))
    wide = small.model_copy(update={"data": small.data.model_copy(update={"size": (64, 64)})})
    refused("latents 4x4x4x4, recipe cinemo-tiny expects 4x4x8x8", wide)

    other = tmp_path / "other"
    storage.upload(Path(dataset), str(other))
    info = storage.read_json(str(other / "dataset.json"))
    storage.write_json(str(other / "dataset.json"), info | {"fingerprint": "e" * 64})
    refused(
        rf"was trained on dataset .*; give the same --data, or .*: --resume {stored}/train/\S+ and another --output",
        data=str(other),
    )
    storage.write_json(str(other / "dataset.json"), info | {"complete": False})
    refused("not complete", data=str(other))
    assert sorted(path.name for path in stored.iterdir()) == ["train"], "a refused call leaves nothing behind"


def test_what_goes_on_otherwise_is_said(small: Recipe, dataset: str, stored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    storage.upload(Path(dataset), str(other))
    info = storage.read_json(str(other / "dataset.json"))
    storage.write_json(str(other / "dataset.json"), info | {"fingerprint": "e" * 64})

    def start(data: str, changes: list[str], **options: Any) -> Start:
        given: dict[str, Any] = {
            "output": str(tmp_path / "new"),
            "resume": str(stored),
            "change_batch": False,
        } | options
        found = starting_point(
            override(small, changes).with_lanes(), [Source(data)], [DatasetIndex.load(data)], **given
        )
        assert found is not None
        assert found.card.step == 3
        return found

    same = start(dataset, [], output=str(stored), resume="auto")
    assert (same.other_data, same.changes) == (False, ())
    larger = ["train.global_batch=8", "train.lanes=null"]
    batch = start(dataset, larger, output=str(stored), resume="auto", change_batch=True)
    (line,) = batch.changes
    assert "at step 3 with another train.global_batch 4 -> 8; train.lanes 2 -> 8; what its epoch has not seen" in line
    assert (batch.other_data, batch.before.train.global_batch, batch.recipe.train.lanes) == (False, 4, 8)
    digest = dataset_digest(DatasetIndex.load(dataset))
    moved = start(str(other), ["train.where=ssim < 0.8", "train.held_out_shards=1"])
    assert moved.other_data
    assert moved.changes == (f"goes on at step 3 with another dataset: {digest} -> {other}, from its first epoch",)
    with pytest.raises(InputError, match=r"another train\.global_batch 4 -> 8; .*--change-batch"):
        start(str(other), ["train.global_batch=8"])


@pytest.mark.release
@pytest.mark.ray
def test_weights_optimiser_and_step_go_on_with_another_dataset(
    small: Recipe, dataset: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two workers, which share one lane, and with another filter."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = ["train.max_steps=3", "train.checkpoint_every=3", "train.sample_every=0", "train.canary=0"]
    settings.append("train.lanes=1")
    jobs.append(Job(override(small, settings), dataset, tmp_path / "first", tmp_path / "first.log"))
    assert jobs[0].process.wait(PATIENCE) == 0, jobs[0].log.read_text()

    other = str(tmp_path / "other")
    fingerprint = storage.read_json(f"{dataset}/dataset.json")["fingerprint"]
    records = [shards.commit(other, 0, moving_samples(8), [], fingerprint)]
    storage.write_bytes(f"{other}/index.parquet", shards.index_bytes(records))
    info = storage.read_json(f"{dataset}/dataset.json") | {"samples": 8, "shards": 1}
    storage.write_json(f"{other}/dataset.json", info)
    more = ["train.workers=2", "train.micro_batch=2", "train.where=ssim < 0.8"]
    recipe, output = override(small, [*settings, *more, "train.max_steps=6"]), tmp_path / "second"
    jobs.append(Job(recipe, other, output, tmp_path / "second.log", "--resume", str(tmp_path / "first")))
    assert jobs[1].process.wait(PATIENCE) == 0, jobs[1].log.read_text()
    log = jobs[1].log.read_text()
    assert f"goes on at step 3 with another dataset: {dataset} -> {other}, from its first epoch" in log
    assert "continuing at step 3" in log
    loader = LatentLoader.of(
        DatasetIndex.load(other), recipe.train, kept=select(DatasetIndex.load(other), "ssim < 0.8")
    )
    expected = {3 + step: list(loader.batch(step).keys) for step in range(3)}
    assert sample_log.read(str(output)) == expected
    with (output / "loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 7)), "the curve goes on"
    card = checkpoints.latest(str(output))
    assert card is not None
    state = json.loads(Path(card.uri, "state/state.json").read_text())
    assert (card.step, state["adam_steps"]) == (6, 6)
    assert state["client"]["batches"] == [[3, 4, 1]]
    assert card.dataset == dataset_digest(DatasetIndex.load(other))
