"""The pictures of docs/monitoring.md: a precompute, a training and a server under a real Prometheus.

Each panel is drawn from what Prometheus answers to the panel's own queries, as the files of cluster/grafana have them.
It is not Grafana that draws. The runs are short, so Ray should report more often than every ten seconds:

    RAY_metrics_report_interval_ms=2000 PYTHONPATH=tests python benchmarks/monitoring.py
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from ports import free_port
from prometheus_server import Prometheus
from ray import serve
from serving.process import eventually, png

from cinemo import monitoring
from cinemo.data.precompute import graph
from cinemo.data.precompute.cluster import connect
from cinemo.evaluation.figures import GRID, INK, MUTED
from cinemo.media.synthetic import render_clips
from cinemo.recipes import load_recipe
from cinemo.serving.app import build
from cinemo.training.checkpoint.export import from_checkpoint
from cinemo.training.run import worker

ROOT = Path(__file__).resolve().parents[1]
_ACROSS, _POINTS = 3, 120
_REPORT_SECONDS = 10  # after which Ray has sent all that was recorded
_COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#868e96", "#1864ab", "#e67700")
_UNITS: dict[str, Callable[[float], str]] = {
    "percentunit": lambda value: f"{100 * value:.3g}%",
    "s": lambda value: f"{value:g} s",
    "Bps": lambda value: f"{value / 1e6:g} MB/s",
    "bytes": lambda value: f"{value / 1e9:g} GB",
    "short": lambda value: f"{value:g}",
}


def precompute(directory: Path, clips: int) -> str:
    """A dataset of rendered clips, each many times, and of files that are refused; returns its place."""
    sources = sorted(render_clips(directory / "clips", count=24, seed=7, frames=64).parent.glob("*.mp4"))
    (directory / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (directory / "empty.mp4").write_bytes(b"")
    wrong = [directory / f"{name}.mp4" for name in ("noise", "empty", "lost")]
    rows = []
    for number in range(clips):
        source = wrong[number // 30 % 3] if number % 30 == 29 else sources[number % len(sources)]
        rows.append(json.dumps({"clip_id": f"clip-{number}", "uri": str(source), "caption": "shapes"}))
    manifest = directory / "manifest.jsonl"
    manifest.write_text("\n".join(rows) + "\n")
    recipe = load_recipe("cinemo-tiny", ["data.clips_per_shard=40"])
    return str(graph.run(recipe, str(manifest), str(directory / "dataset"))["output"])


def train(directory: Path, dataset: str, steps: int) -> str:
    settings = [f"train.max_steps={steps}", "train.log_every=2", "train.sample_every=0", "train.global_batch=8"]
    settings += [
        "train.micro_batch=4",
        "train.checkpoint_every=40",
        "train.held_out_shards=1",
        "train.validate_every=20",
    ]
    return worker.run(load_recipe("cinemo-tiny", settings), dataset, str(directory / "run")).checkpoint


def animate(directory: Path, checkpoint: str, port: int, jobs: int) -> str:
    """A server, and jobs that come faster than it makes videos; some requests are mistaken. Returns the bundle."""
    bundle = directory / "bundle"
    from_checkpoint(checkpoint, str(bundle))
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {"bundle": str(bundle), "state": str(directory / "state"), "cpus": 1, "max_batch": 4}
    serve.run(build(settings), name="cinemo")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        eventually(lambda: client.get("/readyz").status_code == 200)
        for number in range(jobs):
            asked = {
                "prompt": "a boat on the sea",
                "num_inference_steps": str(20 + 10 * (number % 3)),
                "seed": str(number),
            }
            client.post("/v1/videos", data=asked, files={"input_reference": ("a.png", png())}).raise_for_status()
            client.get("/v1/videos?limit=10")
            if number % 5 == 4:
                client.get("/v1/videos/video_nowhere")
            time.sleep(1.5)
        eventually(lambda: client.get("/readyz").json()["queued"] == 0, 300, every=1)
        time.sleep(15)  # the last ones end
    return str(bundle)


def picture(dashboard: dict[str, Any], prometheus: Prometheus, start: float, end: float, scratch: str) -> Figure:
    """All panels of a dashboard from ``start`` to ``end`` (Unix time); paths are shortened by ``scratch``."""
    panels = dashboard["panels"]
    rows = -(-len(panels) // _ACROSS)
    figure = Figure(figsize=(13, 2.5 * rows), dpi=80, layout="constrained")
    figure.suptitle(dashboard["title"], color=INK, fontsize=13, fontweight="bold")
    every = figure.subplots(rows, _ACROSS, squeeze=False).flatten()
    for axes, panel in zip(every, panels, strict=False):
        _draw(axes, panel, prometheus, start, end, scratch)
    for axes in every[len(panels) :]:
        axes.remove()
    return figure


def _draw(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, start: float, end: float, scratch: str) -> None:
    lines: list[tuple[str, np.ndarray, np.ndarray]] = []
    for target in panel["targets"]:
        expression = target["expr"].replace("$output", ".*").replace("$__rate_interval", "20s")
        step = max(2.0, (end - start) / _POINTS)
        found = prometheus.get("query_range", query=expression, start=start, end=end, step=step)["result"]
        for series in found:
            legend = target["legendFormat"]
            for name, value in series["metric"].items():
                legend = legend.replace(f"{{{{{name}}}}}", value.replace(scratch, ""))
            at, values = np.array(series["values"], dtype=float).T
            lines.append((legend, at - start, values))
    style = panel["fieldConfig"]["defaults"]
    if "stacking" in style["custom"] and lines:
        grid = np.unique(np.concatenate([at for _, at, _ in lines]))
        heights = [np.interp(grid, at, values, left=0, right=0) for _, at, values in lines]
        axes.stackplot(grid, heights, labels=[legend for legend, _, _ in lines], colors=_COLOURS, alpha=0.7)
    else:
        for number, (legend, at, values) in enumerate(lines):
            axes.plot(at, values, label=legend, color=_COLOURS[number % len(_COLOURS)], linewidth=1.4)
    axes.set_title(panel["title"], fontsize=10, loc="left", color=INK)
    axes.set_xlim(0, end - start)
    axes.set_ylim(bottom=0)
    if not lines:
        axes.text(0.5, 0.5, "no data here", transform=axes.transAxes, ha="center", color=MUTED)
    elif len(lines) > 1 or "{{" in panel["targets"][0]["legendFormat"]:
        axes.legend(fontsize=7, frameon=False, ncols=2 if len(lines) > 3 else 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{int(seconds) // 60}:{int(seconds) % 60:02d}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 3, 6, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _UNITS[style["unit"]](value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=8, color=GRID)
    axes.grid(color=GRID)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 64 colours, which is a third of the size and looks the same."""
    content = io.BytesIO()
    figure.savefig(content)
    Image.open(content).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        directory, port = Path(scratch), free_port()
        connect()
        prometheus = Prometheus([f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}", f"127.0.0.1:{port}"], directory)

        def shown(name: str, work: Callable[[], str]) -> str:
            start = time.time()
            made = work()
            time.sleep(_REPORT_SECONDS)
            dashboard = json.loads((ROOT / "cluster" / "grafana" / f"{name}.json").read_text())
            figure = picture(dashboard, prometheus, start, time.time(), f"{scratch}/")
            save(figure, arguments.output / f"monitoring-{name}.png")
            return made

        try:
            dataset = shown("precompute", lambda: precompute(directory, arguments.clips))
            checkpoint = shown("training", lambda: train(directory, dataset, arguments.steps))
            shown("serving", lambda: animate(directory, checkpoint, port, arguments.jobs))
            state = [(rule["name"], rule["health"], rule["state"]) for rule in rules(prometheus)]
            print(*state, *costs(), sep="\n")
            serve.shutdown()
        finally:
            prometheus.close()
            ray.shutdown()


def costs(times: int = 20_000) -> list[str]:
    """What one value costs whoever records it."""
    lines = []
    for metric in (monitoring.STEPS, monitoring.LOSS, monitoring.DENOISING):
        labels = {"output": "s3://a-bucket/a-run"} if metric.labels else {}
        begun = time.perf_counter()
        for _ in range(times):
            monitoring.record(metric, 0.5, **labels)
        lines.append(f"a {metric.kind}: {(time.perf_counter() - begun) / times * 1e6:.1f} us")
    return lines


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


if __name__ == "__main__":
    main()
