"""One-page HTML reports that need no other file: pictures and videos are inside as data URIs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cinemo.data.shards import DatasetIndex, read_ledger
from cinemo.evaluation.calibration import Calibration
from cinemo.evaluation.figures import (
    calibration_curve,
    data_uri,
    duration_bars,
    image_png,
    loss_curve,
    motion_histogram,
)
from cinemo.evaluation.page import chart, code, number, pair, picture, section, table, tiles, video, write_page


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
        tiles(
            {
                "total time": f"{sum(facts.seconds.values()) / 60:.1f} min",
                "samples": str(data["samples"]),
                "quarantined": str(data["quarantined"]),
                "training steps": f"{facts.losses[-1][0]}",
                "loss": f"{first:.2f} → {last:.2f}",
                "parameters": f"{facts.parameters / 1e6:.1f} M",
            }
        ),
        section("Samples", "Each image animated at three motion buckets, with the same seed. Larger = more motion."),
        _sample_table(facts.samples),
        f'<p class="note">The same frames side by side:</p>{picture(facts.sheet)}',
        section("Training", "The denoising loss over the motion residuals, and where the time went."),
        pair(
            (
                loss_curve(*zip(*facts.losses, strict=True)),
                "Training loss; bold: running mean over a tenth of the run.",
            ),
            (duration_bars(dict(facts.seconds)), "Seconds per stage, process start included."),
        ),
        f'<p class="note">Every parameter and metric is in MLflow: <code>{html.escape(facts.mlflow)}</code></p>',
        *_dataset_part(facts.dataset),
        section("Serving", "One job, asked for over HTTP as any client would: post, poll, download."),
        _served(facts),
        section("Run it yourself", "The commands behind this page."),
        table(["stage", "command"], [[name, code(command)] for name, command in facts.commands.items()]),
        f'<p class="note">Bundle {code(facts.bundle)}, dataset {code(data["fingerprint"])}</p>',
    ]
    write_page(uri, "cinemo demo", body)


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
        tiles(
            {
                "samples": str(len(rows)),
                "bucket / motion rank correlation": spearman,
                **{name.replace("_", " "): number(value) for name, value in metrics.items()},
            }
        ),
        section("Motion control", "Generated motion by the bucket that was asked for: it should rise."),
        pair(
            (calibration_curve(calibration), "Bold: mean over images. Thin: each image."),
            (motion_histogram(dataset), "The buckets of the dataset, for comparison."),
        ),
        section("Samples", "Odd rows: the clip, as its latents decode. Even rows: generated from its first frame."),
        picture(sheet),
        table(list(rows[0]), [[html.escape(number(value)) for value in row.values()] for row in rows]),
        *_dataset_part(dataset, histogram=False),
    ]
    write_page(uri, title, body)


def _dataset_part(dataset: DatasetIndex, histogram: bool = True) -> list[str]:
    """Totals, the motion buckets, and what was refused: one row per stage and reason, with an example."""
    info = dataset.info
    height, width = info["size"]
    text = f"{info['samples']} samples of {info['frames']} frames at {width}×{height}; {info['quarantined']} refused."
    refused: dict[tuple[str, str], list[str]] = {}
    for shard in dataset.shards:
        for refusal in read_ledger(dataset.uri, shard):
            refused.setdefault((refusal.stage, refusal.reason), []).append(refusal.detail)
    reasons = ""
    if refused:
        rows = [[*key, str(len(details)), html.escape(details[0])] for key, details in sorted(refused.items())]
        reasons = table(["stage", "reason", "clips", "for example"], rows)
    if not histogram:
        return [section("Data", text), reasons]
    buckets = chart(motion_histogram(dataset), "Motion buckets of the samples, from their stored SSIM.")
    return [section("Data", text), f'<div class="pair">{buckets}<div>{reasons}</div></div>']


def _sample_table(samples: Sequence[Sample]) -> str:
    """One row per prompt: the image, then its videos by motion bucket."""
    buckets = sorted({sample.motion_bucket for sample in samples})
    header = "".join(f"<th>motion bucket {bucket}</th>" for bucket in buckets)
    rows = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        own = {sample.motion_bucket: sample for sample in samples if sample.prompt == prompt}
        image = data_uri(image_png(next(iter(own.values())).image), "image/png")
        cells = "".join(f"<td>{video(own[bucket].video)}</td>" if bucket in own else "<td></td>" for bucket in buckets)
        text = html.escape(prompt)
        rows.append(f'<tr><td><img src="{image}" alt="{text}"><span class="note">{text}</span></td>{cells}</tr>')
    return f'<table class="samples"><tr><th>image and prompt</th>{header}</tr>{"".join(rows)}</table>'


def _served(facts: DemoFacts) -> str:
    rows = [[html.escape(key), html.escape(str(value))] for key, value in facts.serving.items()]
    return f'<div class="pair"><div>{video(facts.served)}</div><div>{table(["field", "value"], rows)}</div></div>'
