"""What a real Prometheus scrapes from real runs; and what dashboards, alerts and docs say of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from ports import free_port
from prometheus_server import ALERTS, Prometheus, find_programs, names_in, rules_file
from serving.process import FINAL, eventually, png
from tiny import tiny_bundle

from cinemo import monitoring
from cinemo.data.precompute import exported
from cinemo.data.precompute.progress import Figures
from cinemo.media.synthetic import render_clips
from cinemo.monitoring import RECORDED, SERVER
from cinemo.recipes import load_recipe
from cinemo.training.report.exported import Exported
from cinemo.training.report.metrics import Report
from cinemo.training.report.progress import TrainSummary
from tools.dashboards import DASHBOARDS, FOLDER, text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "monitoring.md"
needs_prometheus = pytest.mark.skipif(
    find_programs() is None, reason="Prometheus is not installed (Debian: prometheus)"
)


# --- what is written down --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_the_committed_dashboard_is_the_one_described(dashboard: Any) -> None:
    assert (FOLDER / f"{dashboard.name}.json").read_text() == text(dashboard), "run python -m tools.dashboards"


def test_the_docs_list_every_metric() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]+?) \| ([^|]*?) \| ([^|]+?) \|$", DOCS.read_text(), re.MULTILINE)
    found = {name: rest for name, *rest in rows}
    told = {
        metric.exported: [metric.kind, metric.unit, " ".join(f"`{label}`" for label in metric.labels), metric.meaning]
        for metric in (*RECORDED, *SERVER)
    }
    assert found == told


def test_the_docs_say_of_every_alert_what_to_do() -> None:
    groups = yaml.safe_load(ALERTS.read_text())["spec"]["groups"]
    names = [rule["alert"] for group in groups for rule in group["rules"]]
    assert re.findall(r"^\| `(Cinemo\w+)` \|", DOCS.read_text(), re.MULTILINE) == names


@needs_prometheus
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    rules = rules_file(tmp_path)
    shutil.copy(ROOT / "tests" / "cluster" / "alerts_test.yaml", tmp_path)
    for words in (["check", "rules", rules], ["test", "rules", tmp_path / "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# --- what is recorded ------------------------------------------------------------------------------------------------


class Told:
    """What was recorded, by metric and the values of its labels but ``output``: counters are summed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: Counter[tuple[str, ...]] = Counter()
        for module in (monitoring, exported):
            monkeypatch.setattr(module, "record", self)

    def __call__(self, metric: monitoring.Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        key = (metric.name, *(labels[name] for name in metric.labels if name != "output"))
        self.values[key] = value + (self.values[key] if metric.kind == "counter" else 0)  # type: ignore[assignment]


def test_counters_of_a_precompute_follow_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    told, heard = Told(monkeypatch), list[Figures]()
    listener = exported.Exported("d", heard.append)
    monkeypatch.setattr(time, "time", lambda: 50.0)
    for shards, refused in ((0, 1), (1, 3), (1, 3)):
        figures = Figures(
            100, 30 + refused, 20, 10 * shards, shards, 10, 100 * shards, 5.0, 0.0, 0.5, {}, {"no": refused}
        )
        listener(figures)
        monkeypatch.setattr(time, "time", lambda: 60.0)
    assert len(heard) == 3
    values = told.values
    assert values["cinemo_precompute_clips", "decode"] == 33
    assert values["cinemo_precompute_quarantined", "no"] == 3
    assert (values["cinemo_precompute_shards",], values["cinemo_precompute_shards_left",]) == (1, 9)
    assert values["cinemo_precompute_refused_ratio",] == pytest.approx(3 / 33)
    assert values["cinemo_precompute_committed_time",] == 60
    assert ("cinemo_precompute_left_seconds",) not in values  # at a rate of 0


def test_a_training_that_falls_back_counts_what_it_does_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    training = Exported("r", max_steps=8, global_batch=4)
    training.started(0)
    for step in (2, 4):
        training.report(Report(step, 0.5, 1e-4, 1.0, 8.0, 0.1, skipped_steps=step == 4))
    training.saved()
    training.started(2)
    training.report(Report(4, 0.4, 1e-4, 1.0, 8.0, 0.1))
    values = {name.removeprefix("cinemo_train_"): value for (name,), value in told.values.items()}
    assert (values["steps"], values["samples"], values["starts"], values["checkpoints"]) == (6, 24, 2, 1)
    assert (values["step"], values["steps_planned"], values["step_seconds"]) == (4, 8, 0.5)
    assert values["skipped_steps"] == 1
    assert not values.keys() & {"mfu_ratio", "val_loss", "memory_bytes"}  # not known here
    told.values.clear()
    training.repeat()  # or Ray would forget them before the next report
    assert told.values[("cinemo_train_step",)] == 4
    assert ("cinemo_train_reported_time",) in told.values
    assert ("cinemo_train_steps",) not in told.values


# --- real runs, and a real Prometheus --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scraped:
    """Runs that have ended in a Ray that goes on, and a server that has made one video."""

    prometheus: Prometheus
    dataset: dict[str, Any]  # the summary of its precompute run
    run: str
    trained: TrainSummary

    def becomes(self, expression: str, expected: dict[tuple[str, ...], float]) -> None:
        """Ray sends what was recorded every ten seconds."""
        deadline = time.monotonic() + 40
        while (found := self.prometheus.values(expression)) != pytest.approx(expected):
            assert time.monotonic() < deadline, (expression, found, expected)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def scraped(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    import ray
    from ray import serve

    from cinemo.data.precompute import graph
    from cinemo.serving.app import build
    from cinemo.training.run import worker

    if find_programs() is None:
        pytest.skip("Prometheus is not installed (Debian: prometheus)")
    directory = tmp_path_factory.mktemp("monitored")
    manifest = render_clips(directory / "clips", count=8, seed=7, size=(72, 104), frames=64)
    (manifest.parent / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    with manifest.open("a") as file:
        for name in ("noise", "lost", "lost-too"):
            file.write(json.dumps({"clip_id": name, "uri": f"{name}.mp4", "caption": "no video"}) + "\n")
    settings = ["data.clips_per_shard=4", "train.max_steps=4", "train.global_batch=4", "train.micro_batch=2"]
    settings += ["train.log_every=1", "train.sample_every=0", "train.checkpoint_every=2"]
    recipe, run = load_recipe("cinemo-tiny", settings), str(directory / "run")
    server = f"127.0.0.1:{free_port()}"
    prometheus = Prometheus([f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}", server], directory)
    try:
        dataset = graph.run(recipe, str(manifest), str(directory / "dataset"))
        trained = worker.run(recipe, dataset["output"], run)
        serve.start(http_options={"host": "127.0.0.1", "port": int(server.partition(":")[2])})
        bundle = tiny_bundle(directory / "tiny")
        serve.run(build({"bundle": str(bundle), "state": str(directory / "state"), "cpus": 1}), name="cinemo")
        with httpx.Client(base_url=f"http://{server}", timeout=30) as client:
            eventually(lambda: client.get("/readyz").status_code == 200)
            files = {"input_reference": ("a.png", png())}
            video = client.post("/v1/videos", data={"prompt": "waves"}, files=files).raise_for_status().json()["id"]
            eventually(lambda: client.get(f"/v1/videos/{video}").json()["status"] in FINAL)
        yield Scraped(prometheus, dataset, run, trained)
    finally:
        serve.shutdown()
        prometheus.close()


@pytest.mark.release
@pytest.mark.ray
@pytest.mark.slow
def test_a_precompute_run_is_told_as_its_summary_says(scraped: Scraped) -> None:
    dataset = scraped.dataset
    only = f'output="{dataset["output"]}"'
    assert (dataset["clips"], dataset["quarantined"], len(dataset["reasons"])) == (11, 3, 2)
    reasons = {(reason,): count for reason, count in dataset["reasons"].items()}
    scraped.becomes(f"sum by (reason) (ray_cinemo_precompute_quarantined_total{{{only}}})", reasons)
    stages = dict.fromkeys([("commit",), ("decode",), ("encode",)], 11)
    scraped.becomes(f"sum by (stage) (ray_cinemo_precompute_clips_total{{{only}}})", stages)
    scraped.becomes(f"sum(ray_cinemo_precompute_shards_total{{{only}}})", {(): dataset["shards"]})
    scraped.becomes(f"sum(last_over_time(ray_cinemo_precompute_shards_left{{{only}}}[1h]))", {(): 0})
    scraped.becomes(f"max(last_over_time(ray_cinemo_precompute_refused_ratio{{{only}}}[1h]))", {(): 3 / 11})


@pytest.mark.release
@pytest.mark.ray
@pytest.mark.slow
def test_a_training_is_told_as_its_summary_says(scraped: Scraped) -> None:
    only = f'output="{scraped.run}"'
    for name, value in (
        ("steps_total", 4),
        ("samples_total", 16),
        ("checkpoints_total", 2),
        ("starts_total", 1),
        ("step", 4),
        ("steps_planned", 4),
        ("loss", scraped.trained.last_loss),  # the last tenth of four reports is the last
        ("skipped_steps", 0),
    ):
        scraped.becomes(f"sum(last_over_time(ray_cinemo_train_{name}{{{only}}}[1h]))", {(): value})  # gauges are gone
    waited = scraped.prometheus.values(f"sum(last_over_time(ray_cinemo_train_data_wait_ratio{{{only}}}[1h]))")[()]
    assert 0 <= waited < 1


@pytest.mark.release
@pytest.mark.ray
@pytest.mark.slow
def test_a_server_is_told_with_its_jobs(scraped: Scraped) -> None:
    ended = {("cancelled",): 0, ("completed",): 1, ("failed",): 0}
    scraped.becomes("max by (status) (cinemo_jobs_finished_total)", ended)
    scraped.becomes('max by (status) (cinemo_jobs{status="completed"})', {("completed",): 1})
    scraped.becomes("max(cinemo_job_run_seconds_count)", {(): 1})
    scraped.becomes("max(cinemo_ready)", {(): 1})
    scraped.becomes('sum(ray_serve_deployment_replica_healthy{deployment="animator"})', {(): 1})
    asked = scraped.prometheus.values('sum by (status) (cinemo_http_request_seconds_count{route="/v1/videos"})')
    assert asked[("202",)] == 1
    # Of the one video, each in a call of its own; those of the warm-up are not told.
    scraped.becomes("sum(ray_cinemo_serve_video_steps_total)", {(): 4})
    scraped.becomes("sum(ray_cinemo_serve_step_seconds_count)", {(): 4})


@pytest.mark.release
@pytest.mark.ray
@pytest.mark.slow
def test_dashboards_and_alerts_ask_for_what_is_exported(scraped: Scraped) -> None:
    """Every name was scraped here, but of accelerators, which Ray names, and what a training on a CPU cannot know."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    scraped.becomes("max(cinemo_ready)", {(): 1})
    known = {names_in(name).pop() for name in scraped.prometheus.get("label/__name__/values") if names_in(name)}
    known |= {f"ray_{name}" for name in METRICS_GAUGES if "gpu" in name}
    known |= {metric.exported for metric in (monitoring.MFU, monitoring.VAL_LOSS)}
    panels = {
        (path.stem, panel["title"]): [target["expr"] for target in panel["targets"]]
        for path in FOLDER.glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
    }
    groups = yaml.safe_load(ALERTS.read_text())["spec"]["groups"]
    alerts = {("alerts", rule["alert"]): [rule["expr"]] for group in groups for rule in group["rules"]}
    for where, expressions in (panels | alerts).items():
        for expression in expressions:
            assert names_in(expression), where
            assert names_in(expression) <= known, where
            scraped.prometheus.values(expression.replace("$output", ".*").replace("$__rate_interval", "1m"))
    states = {rule["health"] for group in scraped.prometheus.get("rules")["groups"] for rule in group["rules"]}
    assert states <= {"ok", "unknown"}  # unknown: not evaluated yet
