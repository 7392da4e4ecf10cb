"""The Grafana dashboards of ``cluster/grafana``, described here and written there: ``python -m tools.dashboards``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "cluster" / "grafana"
_WIDTH, _HEIGHT, _ACROSS = 8, 7, 3  # of a panel in Grafana's grid of 24 columns
_RANGE = "[$__rate_interval]"
_RUN = '{output=~"$output"}'


@dataclass(frozen=True)
class Panel:
    """``unit``: as Grafana names it. ``queries``: (expression, legend); ``stacked``: they add up to something."""

    title: str
    unit: str
    meaning: str
    queries: Sequence[tuple[str, str]]
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """``outputs``: the metric whose label ``output`` names the runs to choose from; None where there are no runs."""

    name: str
    title: str
    panels: Sequence[Panel]
    outputs: str | None = None

    def content(self) -> dict[str, Any]:
        """What Grafana imports."""
        variables: list[dict[str, Any]] = [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
        ]
        if self.outputs:
            variables.append(
                {
                    "name": "output",
                    "label": "Output",
                    "type": "query",
                    "datasource": _SOURCE,
                    "query": f"label_values({self.outputs}, output)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                }
            )
        return {
            "uid": f"cinemo-{self.name}",
            "title": self.title,
            "tags": ["cinemo"],
            "schemaVersion": 39,
            "editable": True,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": variables},
            "panels": [_panel(number, panel) for number, panel in enumerate(self.panels)],
        }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, _ACROSS)
    style = {"lineWidth": 1, "fillOpacity": 20, "stacking": {"mode": "normal"}} if panel.stacked else {"lineWidth": 1}
    limits = {"min": 0} | ({"max": 1} if panel.unit == "percentunit" else {})
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": style} | limits, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(panel.queries)
        ],
    }


_NODES = Panel(
    "Nodes",
    "percentunit",
    "Busy cores, memory and accelerators, the mean over all nodes; Ray's own metrics.",
    [
        ("avg(ray_node_cpu_utilization) / 100", "CPU"),
        ("sum(ray_node_mem_used) / sum(ray_node_mem_total)", "memory"),
        ("avg(ray_node_gpus_utilization) / 100", "GPU"),
    ],
)

PRECOMPUTE = Dashboard(
    "precompute",
    "Cinemo: precompute",
    outputs="ray_cinemo_precompute_shards_left",
    panels=[
        Panel(
            "Clips per second",
            "short",
            "Clips that went through each stage. Where one is faster for long, what it made waits for the next.",
            [(f"sum by (stage) (rate(ray_cinemo_precompute_clips_total{_RUN}{_RANGE}))", "{{stage}}")],
        ),
        Panel(
            "Shards",
            "short",
            "Committed so far, restarts included, and left to this run.",
            [
                (f"sum(ray_cinemo_precompute_shards_total{_RUN})", "committed"),
                (f"sum(ray_cinemo_precompute_shards_left{_RUN})", "left"),
            ],
        ),
        Panel(
            "Time left",
            "s",
            "By the rate of the last minute.",
            [(f"max by (output) (ray_cinemo_precompute_left_seconds{_RUN})", "{{output}}")],
        ),
        Panel(
            "Refused clips by reason",
            "short",
            "In all; each is a line in the dataset's quarantine/.",
            [(f"sum by (reason) (ray_cinemo_precompute_quarantined_total{_RUN})", "{{reason}}")],
            stacked=True,
        ),
        Panel(
            "Refused share",
            "percentunit",
            "Of the clips that this run has decoded.",
            [(f"max by (output) (ray_cinemo_precompute_refused_ratio{_RUN})", "{{output}}")],
        ),
        Panel(
            "Since the last commit",
            "s",
            "Grows to the time of a shard, then falls; what only grows is stuck.",
            [(f"time() - max by (output) (ray_cinemo_precompute_committed_time{_RUN})", "{{output}}")],
        ),
        Panel(
            "Busy processes",
            "percentunit",
            "Share of each stage's processes, over a minute. The stage near 100 % decides the pace.",
            [(f"avg by (stage) (ray_cinemo_precompute_busy_ratio{_RUN})", "{{stage}}")],
        ),
        Panel(
            "Written",
            "Bps",
            "Bytes of committed shards.",
            [(f"sum(rate(ray_cinemo_precompute_bytes_total{_RUN}{_RANGE}))", "shards")],
        ),
        _NODES,
    ],
)

TRAINING = Dashboard(
    "training",
    "Cinemo: training",
    outputs="ray_cinemo_train_step",
    panels=[
        Panel(
            "Loss",
            "short",
            "Mean since the report before, and on held-out shards.",
            [
                (f"max by (output) (ray_cinemo_train_loss{_RUN})", "loss {{output}}"),
                (f"max by (output) (ray_cinemo_train_val_loss{_RUN})", "validation {{output}}"),
            ],
        ),
        Panel(
            "Steps",
            "short",
            "Done, and the last one planned.",
            [
                (f"max by (output) (ray_cinemo_train_step{_RUN})", "{{output}}"),
                (f"max by (output) (ray_cinemo_train_steps_planned{_RUN})", "planned"),
            ],
        ),
        Panel(
            "Samples per second",
            "short",
            "Of all workers together.",
            [(f"max by (output) (ray_cinemo_train_samples_per_second{_RUN})", "{{output}}")],
        ),
        Panel(
            "Step time",
            "s",
            "Mean of the steps since the report before.",
            [(f"max by (output) (ray_cinemo_train_step_seconds{_RUN})", "{{output}}")],
        ),
        Panel(
            "Data wait",
            "percentunit",
            "Share of the time in which workers wait for samples.",
            [(f"max by (output) (ray_cinemo_train_data_wait_ratio{_RUN})", "{{output}}")],
        ),
        Panel(
            "MFU",
            "percentunit",
            "FLOPs that the mathematics needs, as a share of what the devices could do; empty where that is unknown.",
            [(f"max by (output) (ray_cinemo_train_mfu_ratio{_RUN})", "{{output}}")],
        ),
        Panel(
            "Gradient norm",
            "short",
            "Before clipping.",
            [(f"max by (output) (ray_cinemo_train_grad_norm{_RUN})", "{{output}}")],
        ),
        Panel(
            "Faults and checkpoints",
            "short",
            "Steps whose gradient was not finite, restarts of the workers, checkpoints stored.",
            [
                (f"max by (output) (ray_cinemo_train_skipped_steps{_RUN})", "skipped steps"),
                (f"sum by (output) (ray_cinemo_train_starts_total{_RUN})", "starts"),
                (f"sum by (output) (ray_cinemo_train_checkpoints_total{_RUN})", "checkpoints"),
            ],
        ),
        Panel(
            "Since the last report",
            "s",
            "Grows to the time of train.log_every steps, then falls; what only grows is stuck.",
            [(f"time() - max by (output) (ray_cinemo_train_reported_time{_RUN})", "{{output}}")],
        ),
        Panel(
            "Memory of a worker",
            "bytes",
            "The most that any has held: allocated on an accelerator, resident on a CPU.",
            [(f"max by (output) (ray_cinemo_train_memory_bytes{_RUN})", "{{output}}")],
        ),
        _NODES,
    ],
)

_REQUESTS = "max by (process, method, route, status, le) (rate(cinemo_http_request_seconds_{}{}))"


def _quantile(share: float, rates: str) -> str:
    return f"histogram_quantile({share:g}, sum by (le) ({rates}))"


SERVING = Dashboard(
    "serving",
    "Cinemo: serving",
    # Any process of a server says the same of its jobs, hence the maximum.
    panels=[
        Panel(
            "Jobs by state",
            "short",
            "Waiting and under way.",
            [('max by (status) (cinemo_jobs{status=~"queued|in_progress"})', "{{status}}")],
            stacked=True,
        ),
        Panel(
            "Age of the oldest waiting job",
            "s",
            "What grows without end needs more animators.",
            [("max(cinemo_oldest_waiting_seconds)", "age")],
        ),
        Panel(
            "Jobs ended per minute",
            "short",
            "By how they ended.",
            [(f"60 * max by (status) (rate(cinemo_jobs_finished_total{_RANGE}))", "{{status}}")],
        ),
        Panel(
            "Time in the queue, time of a video",
            "s",
            "From submission to the start and from there to the end, of jobs that ended.",
            [
                (_quantile(share, f"max by (le) (rate(cinemo_job_{part}_seconds_bucket{_RANGE}))"), f"{part} {name}")
                for part in ("queue", "run")
                for share, name in ((0.5, "median"), (0.95, "p95"))
            ],
        ),
        Panel(
            "Denoising step",
            "s",
            "One call of the network for all videos whose turn it is.",
            [
                (_quantile(share, f"rate(ray_cinemo_serve_step_seconds_bucket{_RANGE})"), name)
                for share, name in ((0.5, "median"), (0.95, "p95"))
            ],
        ),
        Panel(
            "Videos in a call",
            "short",
            "Mean; at --max-batch an animator is full.",
            [
                (
                    f"sum(rate(ray_cinemo_serve_video_steps_total{_RANGE})) / "
                    f"sum(rate(ray_cinemo_serve_step_seconds_count{_RANGE}))",
                    "videos",
                )
            ],
        ),
        Panel(
            "Ready",
            "short",
            "1 where the server answers /readyz with 200; and how many replicas Ray Serve has.",
            [
                ("max(cinemo_ready)", "ready"),
                ("sum by (deployment) (ray_serve_deployment_replica_healthy)", "{{deployment}}"),
            ],
        ),
        Panel(
            "Answers per second",
            "short",
            "By HTTP status.",
            [(f"sum by (status) ({_REQUESTS.format('count', _RANGE)})", "{{status}}")],
            stacked=True,
        ),
        Panel(
            "Time until an answer begins",
            "s",
            "95 of 100 answers come within it.",
            [(_quantile(0.95, _REQUESTS.format("bucket", _RANGE)), "p95")],
        ),
        _NODES,
    ],
)

DASHBOARDS = (PRECOMPUTE, TRAINING, SERVING)


def text(dashboard: Dashboard) -> str:
    """The file's content."""
    return json.dumps(dashboard.content(), indent=2) + "\n"


if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(text(dashboard))
