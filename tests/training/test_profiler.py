"""A profile on request: of the steps that were asked for, with its files, its spans and its place in MLflow."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.recipes import override
from cinemo.training.report.board import events, known_steps
from cinemo.training.report.profiled import Profiled, ProfileRequest
from cinemo.training.report.progress import Progress
from cinemo.training.run import profiler, worker
from cinemo.training.run.batch import FrozenStates
from cinemo.training.run.loop import train
from cinemo.training.run.profiler import Profiler, by_span, span
from cinemo.types import InputError, RunError
from tests.training.ranks import made_engine


def test_steps_are_asked_for_as_reports_count_them() -> None:
    assert ProfileRequest.parse("10:13").steps(0, 100) == range(10, 14)
    assert ProfileRequest.parse("10:10").steps(9, 10) == range(10, 11)
    assert ProfileRequest.parse("3").steps(50, 100) == range(54, 57)  # the first ones settle
    assert ProfileRequest.parse("3").steps(0, 4) == range(2, 5)
    assert ProfileRequest.parse("2", all_ranks=True) == ProfileRequest(None, 2, True)


@pytest.mark.parametrize("text", ["0", "5:2", "1:21", "a", "3:", "-1", "1.5", "21", "0:3"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"^--profile {text}: expected"):
        ProfileRequest.parse(text)


@pytest.mark.parametrize(("text", "done"), [("10:13", 10), ("98:101", 0), ("3", 98)])
def test_steps_that_a_run_does_not_make_are_refused(text: str, done: int) -> None:
    with pytest.raises(InputError, match=rf"this run makes steps {done + 1} to 100; choose among them"):
        ProfileRequest.parse(text).steps(done, 100)


@pytest.fixture(scope="module")
def profiled(
    small: Recipe, dataset: str, process_group: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Profiled]:
    """Steps 2 and 3 of five."""
    output, found = str(tmp_path_factory.mktemp("profiled")), list[Profiled]()
    recipe = override(small, ["train.max_steps=5", "train.checkpoint_every=100"])
    made = made_engine(recipe, max_steps=5)
    watched = Profiler(range(2, 4), 0, output, 0, made.device, found.append)
    batches = LatentLoader(DatasetIndex.load(dataset), global_batch=4, lanes=2, seed=0).batches(0)
    train(recipe, made, batches, FrozenStates.of(recipe), on_step=watched.after)
    assert len(found) == 1
    return output, found[0]


def test_a_trace_holds_the_spans_of_its_steps(profiled: tuple[str, Profiled]) -> None:
    output, event = profiled
    directory = Path(output) / "profile" / "steps-000002-000003"
    assert sorted(event.uris) == [str(directory / f"rank-0.{end}") for end in ("trace.json.gz", "txt")]
    trace = json.loads(gzip.decompress((directory / "rank-0.trace.json.gz").read_bytes()))["traceEvents"]
    names = [entry["name"] for entry in trace if entry.get("cat") == "user_annotation"]
    counts = {name: names.count(name) for name in ("step 1", "step 2", "step 3", "step 4", *profiler.SPANS)}
    # Two micro batches a step.
    asked = {"step 1": 0, "step 2": 1, "step 3": 1, "step 4": 0}
    assert counts == asked | {"data": 2, "forward": 4, "backward": 4, "optimizer": 4}
    assert any(entry["name"] == "[memory]" for entry in trace)
    table = (directory / "rank-0.txt").read_text()
    assert "aten::convolution" in table
    assert "CPU Mem" in table


def test_the_spans_fill_a_step(profiled: tuple[str, Profiled]) -> None:
    output, event = profiled
    lines = (Path(output) / "profile" / "steps-000002-000003" / "rank-0.txt").read_text().splitlines()
    times = {line.split()[0]: float(line.split()[1]) for line in lines[3:10]}
    assert list(times) == [*profiler.SPANS, "other", "communication", "step"]
    assert sum(times[name] for name in (*profiler.SPANS, "other")) == pytest.approx(times["step"], abs=0.05)
    assert min(times["forward"], times["backward"], times["optimizer"]) > 0
    assert times["other"] < 0.5 * times["step"]
    assert event.text.startswith("profile of steps 2-3, rank 0: ")
    assert "backward" in event.text


def test_without_a_profile_a_span_is_nothing() -> None:
    assert span("forward") is span("backward")


def test_who_resumes_behind_it_takes_none(tmp_path: Path) -> None:
    for done in (2, 3, 7):
        watched = Profiler(range(2, 4), done, str(tmp_path), 0, torch.device("cpu"), pytest.fail)
        for step in range(done + 1, 10):
            watched.after(step)
    assert span("forward") is span("backward")
    assert not list(tmp_path.iterdir())


def test_a_storage_that_fails_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(*_: Any) -> None:
        raise RunError("no room")

    monkeypatch.setattr(profiler.storage, "upload", upload)
    found = list[Profiled]()
    watched = Profiler(range(1, 2), 0, str(tmp_path), 0, torch.device("cpu"), found.append)
    torch.zeros(3).add_(1)
    watched.after(1)
    assert found == [Profiled("profile of steps 1-1, rank 0: cannot be stored (no room); training goes on", ())]


def test_kernels_belong_to_the_span_that_launched_them_from_any_thread() -> None:
    def event(name: str, begin: int, end: int, thread: int = 1, **kernels: float) -> FunctionEvent:
        made = FunctionEvent(begin, name, thread, begin, end, device_type=DeviceType.CPU)
        for kernel, duration in kernels.items():
            made.append_kernel(kernel, 0, duration)
        return made

    events = [
        event("step 1", 0, 10_000),
        event("data", 0, 1_000),
        event("forward", 1_000, 3_000),
        event("aten::conv", 1_500, 1_600, gemm=4_000),
        event("backward", 3_000, 8_000),
        event("ConvBackward", 3_100, 3_200, thread=2, gemm_backward=9_000),
        event("c10d::allreduce_", 4_000, 4_500, thread=2, ncclDevKernel_AllReduce=2_000),
        event("nccl:all_reduce", 4_200, 5_000, thread=2),
        event("optimizer", 8_500, 9_500),
        event("aten::_fused_adam_", 8_600, 8_700, adam=1_000),
        event("aten::zeros", 9_700, 9_800, fill=500),
    ]
    rows = {row.name: (row.host, row.device) for row in by_span(events, 1)}
    assert rows == {
        "data": (1.0, 0.0),
        "forward": (2.0, 4.0),
        "backward": (5.0, 9.0),
        "optimizer": (1.0, 1.0),
        "other": (1.0, 0.5),
        "communication": (1.0, 2.0),
        "step": (10.0, 16.5),
    }


def test_its_files_go_into_mlflow(tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output, lines = str(tmp_path), list[str]()
    uri = storage.join(output, "profile", "steps-000002-000003", "rank-0.txt")
    storage.write_bytes(uri, b"table")
    progress = Progress(small, output, "/data", "digest", lines.append)
    progress.track()
    progress.handle(Profiled("profile of steps 2-3", (uri,)))
    progress.fail()
    assert "profile of steps 2-3" in lines
    record = json.loads((tmp_path / "run.json").read_text())
    stored = MlflowClient(record["mlflow_uri"]).list_artifacts(record["mlflow_run"], "profile/steps-000002-000003")
    assert [item.path for item in stored] == ["profile/steps-000002-000003/rank-0.txt"]


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.ray
def test_a_job_of_two_workers_is_profiled_and_shown_in_tensorboard(
    small: Recipe, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two = ["workers=2", "micro_batch=2", "max_steps=5", "sample_every=0", "checkpoint_every=5", "tensorboard=true"]
    recipe, output = override(small, [f"train.{setting}" for setting in two]), str(tmp_path)
    with pytest.raises(InputError, match="this run makes steps 1 to 5"):
        worker.run(recipe, dataset, output, profile=ProfileRequest.parse("5:6"))
    worker.run(recipe, dataset, output, profile=ProfileRequest.parse("4:5", all_ranks=True))
    directory = tmp_path / "profile" / "steps-000004-000005"
    ends = ("trace.json.gz", "txt")
    assert sorted(path.name for path in directory.iterdir()) == [f"rank-{r}.{end}" for r in (0, 1) for end in ends]
    trace = json.loads(gzip.decompress((directory / "rank-1.trace.json.gz").read_bytes()))["traceEvents"]
    names = {entry["name"] for entry in trace}
    assert {"step 4", "step 5", *profiler.SPANS, "gloo:all_reduce"} <= names
    mlflow = [str(path) for path in (tmp_path / "mlartifacts").rglob("rank-*.txt")]
    assert len(mlflow) == 2
    assert known_steps(str(tmp_path / "tensorboard")) == {1, 2, 3, 4, 5}
    (sheets,) = (tmp_path / "tensorboard" / "sheets").iterdir()
    assert [event.step for event in events(sheets.read_bytes()) if event.summary.value] == [5]
