"""One-page HTML reports that need no other file: pictures and videos are inside as data URIs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from cinemo import storage
from cinemo.data.shards import DatasetIndex, read_ledger
from cinemo.evaluation.calibration import Calibration
from cinemo.evaluation.figures import (
    calibration_curve,
    data_uri,
    duration_bars,
    figure_png,
    image_png,
    loss_curve,
    motion_histogram,
)

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #667581; --line: #e3e8ec; --accent: #0b7285; --wash: #f5f8f9; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: var(--ink); background: white; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.02em; }
h2 { font-size: 21px; margin: 52px 0 6px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 6px 0 14px; max-width: 72ch; }
.lead, .note, figcaption, dt { color: var(--muted); }
.note, figcaption { font-size: 14px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 24px 0 0; }
dl div { background: var(--wash); border-radius: 8px; padding: 12px 16px; }
dt { font-size: 13px; } dd { margin: 2px 0 0; font-size: 20px; font-weight: 600; white-space: nowrap; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 28px; margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; margin-top: 12px; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: 13px; font-weight: 600; color: var(--muted); } td.number { font-variant-numeric: tabular-nums; }
.samples { table-layout: fixed; border-spacing: 0; }
.samples td, .samples th { padding: 6px 8px; border: 0; }
.samples td:first-child, .samples th:first-child { padding-left: 0; }
.samples td:last-child, .samples th:last-child { padding-right: 0; }
video, .samples img { width: 100%; display: block; border-radius: 6px; background: var(--line); }
code { font: 13.5px/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; background: var(--wash);
  padding: 2px 5px; border-radius: 4px; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Sample:
    """A generated video: the picture it began with, what was asked, and the mp4's bytes."""

    image: Any
    prompt: str
    motion_bucket: int
    video: bytes


@dataclass(frozen=True)
class DemoFacts:
    """Everything the demo's page shows. ``losses``: (step, loss); ``seconds``: stage -> time in this order."""

    dataset: DatasetIndex
    losses: Sequence[tuple[int, float]]
    samples: Sequence[Sample]
    sheet: Image.Image
    served: bytes
    serving: Mapping[str, Any]
    seconds: Mapping[str, float]
    bundle: str
    parameters: int
    commands: Mapping[str, str]
    mlflow: str


def write_demo_report(uri: str, facts: DemoFacts) -> None:
    """The page that ``make demo`` leaves behind."""
    data = facts.dataset.info
    first, last = facts.losses[0][1], facts.losses[-1][1]
    body = [
        "<h1>From clips to animated images</h1>",
        '<p class="lead">The whole chain on this machine: clips became latent shards, shards a model, the model '
        "videos, and an HTTP endpoint answered with one. It is the published method at the size of a toy: judge the "
        "chain and the motion, not the picture quality.</p>",
        _figures(
            {
                "total time": f"{sum(facts.seconds.values()) / 60:.1f} min",
                "samples": str(data["samples"]),
                "quarantined": str(data["quarantined"]),
                "training steps": f"{facts.losses[-1][0]}",
                "loss": f"{first:.2f} → {last:.2f}",
                "parameters": f"{facts.parameters / 1e6:.1f} M",
            }
        ),
        _section("Samples", "Each image animated at three motion buckets, with the same seed. Larger = more motion."),
        _sample_table(facts.samples),
        f'<p class="note">The same frames side by side:</p>{_picture(facts.sheet)}',
        _section("Training", "The denoising loss over the motion residuals, and where the time went."),
        _pair(
            (
                loss_curve(*zip(*facts.losses, strict=True)),
                "Training loss; bold: running mean over a tenth of the run.",
            ),
            (duration_bars(dict(facts.seconds)), "Seconds per stage, process start included."),
        ),
        f'<p class="note">Every parameter and metric is in MLflow: <code>{html.escape(facts.mlflow)}</code></p>',
        *_dataset_part(facts.dataset),
        _section("Serving", "One job, asked for over HTTP as any client would: post, poll, download."),
        _served(facts),
        _section("Run it yourself", "The commands behind this page."),
        _table(["stage", "command"], [[name, _code(command)] for name, command in facts.commands.items()]),
        f'<p class="note">Bundle {_code(facts.bundle)}, dataset {_code(data["fingerprint"])}</p>',
    ]
    _write_page(uri, "cinemo demo", body)


def write_evaluation_report(
    uri: str,
    title: str,
    metrics: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    calibration: Calibration,
    dataset: DatasetIndex,
    sheet: Image.Image,
) -> None:
    """The page of ``pipelines/evaluate.py``: mean metrics, the motion-control report, every sample's figures."""
    spearman = "-" if calibration.spearman is None else f"{calibration.spearman:.2f}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        '<p class="lead">Measured on samples of a dataset: each was animated from its own first frame, caption and '
        "motion bucket, and compared with the clip it came from.</p>",
        _figures(
            {
                "samples": str(len(rows)),
                "bucket / motion rank correlation": spearman,
                **{name.replace("_", " "): _number(value) for name, value in metrics.items()},
            }
        ),
        _section("Motion control", "Generated motion by the bucket that was asked for: it should rise."),
        _pair(
            (calibration_curve(calibration), "Bold: mean over images. Thin: each image."),
            (motion_histogram(dataset), "The buckets of the dataset, for comparison."),
        ),
        _section("Samples", "Odd rows: the clip, as its latents decode. Even rows: generated from its first frame."),
        _picture(sheet),
        _table(list(rows[0]), [[html.escape(_number(value)) for value in row.values()] for row in rows]),
        *_dataset_part(dataset, histogram=False),
    ]
    _write_page(uri, title, body)


def _dataset_part(dataset: DatasetIndex, histogram: bool = True) -> list[str]:
    """Totals, the motion buckets, and what was refused: one row per stage and reason, with an example."""
    info = dataset.info
    height, width = info["size"]
    text = f"{info['samples']} samples of {info['frames']} frames at {width}×{height}; {info['quarantined']} refused."
    refused: dict[tuple[str, str], list[str]] = {}
    for shard in dataset.shards:
        for refusal in read_ledger(dataset.uri, shard):
            refused.setdefault((refusal.stage, refusal.reason), []).append(refusal.detail)
    table = ""
    if refused:
        rows = [[*key, str(len(details)), html.escape(details[0])] for key, details in sorted(refused.items())]
        table = _table(["stage", "reason", "clips", "for example"], rows)
    if not histogram:
        return [_section("Data", text), table]
    chart = _chart(motion_histogram(dataset), "Motion buckets of the samples, from their stored SSIM.")
    return [_section("Data", text), f'<div class="pair">{chart}<div>{table}</div></div>']


def _sample_table(samples: Sequence[Sample]) -> str:
    """One row per prompt: the image, then its videos by motion bucket."""
    buckets = sorted({sample.motion_bucket for sample in samples})
    header = "".join(f"<th>motion bucket {bucket}</th>" for bucket in buckets)
    rows = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        own = {sample.motion_bucket: sample for sample in samples if sample.prompt == prompt}
        image = data_uri(image_png(next(iter(own.values())).image), "image/png")
        cells = "".join(f"<td>{_video(own[bucket].video)}</td>" if bucket in own else "<td></td>" for bucket in buckets)
        text = html.escape(prompt)
        rows.append(f'<tr><td><img src="{image}" alt="{text}"><span class="note">{text}</span></td>{cells}</tr>')
    return f'<table class="samples"><tr><th>image and prompt</th>{header}</tr>{"".join(rows)}</table>'


def _served(facts: DemoFacts) -> str:
    rows = [[html.escape(key), html.escape(str(value))] for key, value in facts.serving.items()]
    return f'<div class="pair"><div>{_video(facts.served)}</div><div>{_table(["field", "value"], rows)}</div></div>'


def _section(title: str, text: str) -> str:
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"


def _figures(values: Mapping[str, str]) -> str:
    cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(cells)}</dl>"


def _pair(*charts: tuple[Figure, str]) -> str:
    return f'<div class="pair">{"".join(_chart(*chart) for chart in charts)}</div>'


def _chart(figure: Figure, caption: str) -> str:
    text = html.escape(caption)
    image = f'<img src="{data_uri(figure_png(figure), "image/png")}" alt="{text}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _picture(image: Image.Image) -> str:
    return f'<figure><img src="{data_uri(image_png(image), "image/png")}" alt="contact sheet"></figure>'


def _video(content: bytes) -> str:
    return f'<video src="{data_uri(content, "video/mp4")}" autoplay loop muted playsinline></video>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` are HTML; the header is text."""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write_page(uri: str, title: str, body: Sequence[str]) -> None:
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    storage.write_bytes(uri, page.encode())
