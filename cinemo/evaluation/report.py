"""One-page HTML reports that need no other file: pictures and videos are inside as data URIs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cinemo.data.dataset.shards import DatasetIndex, read_ledger
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
from cinemo.evaluation.rendered import BARS


@dataclass(frozen=True)
class Sample:
    """A generated video: the picture it began with, what was asked (``controls``, in words), and the mp4's bytes."""

    image: Any
    prompt: str
    controls: str
    video: bytes


@dataclass(frozen=True)
class DemoFacts:
    """Everything the demo's page shows.

    ``motion``: figures of `cinemo.evaluation.rendered` for ``base`` and ``tuned``. ``losses``: (step, loss).
    ``seconds``: stage -> time, in this order. ``edges``: between the model's motion buckets.
    """

    motion: Mapping[str, Mapping[str, Any]]
    dataset: DatasetIndex
    edges: Sequence[float]
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
    tuned = facts.motion["tuned"]
    body = [
        "<h1>From clips to animated images</h1>",
        '<p class="lead">The whole chain on this machine: clips became latent shards, the shards a model, the '
        "model made videos, and an HTTP endpoint served one. It is the published method at toy size: "
        f"{parameters_and_size(facts)}. Judge the chain and the motion, not the picture quality.</p>",
        tiles(
            {
                "pans go the right way": f"{tuned['pan_direction_cosine']:.2f}",
                "shapes go the right way": f"{tuned['object_direction_share']:.0%}",
                "fluids go the right way": f"{tuned['fluid_direction_cosine']:.2f}",
                "higher bucket, more motion": f"{tuned['bucket_rank']:.2f}",
                "training steps": f"{facts.losses[-1][0]}",
                "total time": f"{sum(facts.seconds.values()) / 60:.1f} min",
            }
        ),
        *motion_part(facts.motion),
        section("Samples", "Each image animated at three motion buckets, with the same seed. Larger = more motion."),
        _sample_table(facts.samples),
        f'<p class="note">The same frames side by side:</p>{picture(facts.sheet)}',
        section("Training", "The denoising loss over the motion residuals, and where the time went."),
        pair(
            (
                loss_curve(*zip(*facts.losses, strict=True)),
                "Training loss; bold: running mean over a tenth of the run.",
            ),
            (duration_bars(dict(facts.seconds)), "Seconds per stage, including process start-up."),
        ),
        f'<p class="note">Every parameter and metric is in MLflow: <code>{html.escape(facts.mlflow)}</code></p>',
        *_dataset_part(facts.dataset, facts.edges),
        section("Serving", "One job, requested over HTTP as any client would: post, poll, download."),
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
    calibration: Calibration | None,
    dataset: DatasetIndex,
    sheet: Image.Image,
) -> None:
    """The page of ``pipelines/evaluate.py``: mean metrics, every sample's figures, and the motion-control report of a
    method that has such a control."""
    control: list[str] = []
    if calibration is not None:
        control = [
            section("Motion control", "Generated motion by requested level: it should rise."),
            pair(
                (calibration_curve(calibration), "Bold: mean over images. Thin: each image."),
                (motion_histogram(dataset), "The buckets of the dataset, for comparison."),
            ),
        ]
    spearman = "-" if calibration is None or calibration.spearman is None else f"{calibration.spearman:.2f}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        '<p class="lead">Measured on samples of a dataset: each was animated from its own first frame, caption and '
        "controls like the clip's, and compared with the clip it came from.</p>",
        tiles(
            {
                "samples": str(len(rows)),
                "level / motion rank correlation": spearman,
                **{name.replace("_", " "): number(value) for name, value in metrics.items()},
            }
        ),
        *control,
        section("Samples", "Odd rows: the clip, decoded from its latents. Even rows: generated from its first frame."),
        picture(sheet),
        table(list(rows[0]), [[html.escape(number(value)) for value in row.values()] for row in rows]),
        *_dataset_part(dataset),
    ]
    write_page(uri, title, body)


def parameters_and_size(facts: DemoFacts) -> str:
    height, width = facts.dataset.info["size"]
    return f"{facts.parameters / 1e6:.1f} million parameters, {width}×{height} pixels"


# What each figure of `cinemo.evaluation.rendered` says, for people.
_MOTION_ROWS = {
    "pan_direction_cosine": "pans: cosine of the flow with the requested direction",
    "pan_speed_rank": "pans: rank correlation of true and achieved speed",
    "pan_flow_gain": "pans: gain of dense flow on the true flow (1 is perfect)",
    "object_direction_share": "shapes: share that goes the right way",
    "object_iou": "shapes: overlap with the true place at the ninth frame, buckets up to 10",
    "object_flow_gain": "shapes: gain of dense flow",
    "fluid_direction_cosine": "fluids: cosine of the flow with the requested direction",
    "fluid_flow_gain": "fluids: gain of dense flow",
    "bucket_rank": "rank correlation of the requested level of motion and the achieved motion",
    "still_ssim": "still scenes: SSIM of neighbouring frames",
    "first_frame_psnr_gap": "first frame: dB below the autoencoder, at worst",
    "unexplained": "unexplained by one step from noise, right prompt (0 is perfect, 1 is a still picture)",
    "unexplained_opposite_prompt": "the same, opposite direction in the prompt (should be large)",
}


_GIVEN_ROWS = {
    "unexplained": "samples of the dataset: unexplained by one step from noise",
    "unexplained_other_prompt": "the same, with the prompt of another sample (should be larger)",
    "unexplained_other_bucket": "the same, with another level of motion (should be larger)",
}


def motion_part(motion: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the models make of unseen rendered scenes whose true motion is known, against the bars they are held to."""
    rows = []
    for name, text in _MOTION_ROWS.items():
        if any(name not in figures for figures in motion.values()):  # of a control that the method does not have
            continue
        sign, bar = BARS[name]
        shown = "≥ twice that" if name == "unexplained_opposite_prompt" else f"{sign.replace('=', '')}= {bar:g}"
        shown = shown.replace(">=", "≥").replace("<=", "≤")
        rows.append([html.escape(text), *(f"{figures[name]:.3f}" for figures in motion.values()), shown])
    if all("given" in figures for figures in motion.values()):
        for name, text in _GIVEN_ROWS.items():
            if any(name not in figures["given"] for figures in motion.values()):
                continue
            rows.append([html.escape(text), *(f"{figures['given'][name]:.3f}" for figures in motion.values()), ""])
    clips = next(iter(motion.values()))["clips_of_each_kind"]
    text = (
        f"Unseen rendered scenes, {clips} of each kind, whose true motion the renderer knows. SSIM cannot measure this."
    )
    names = {"base": "shipped base", "tuned": "fine-tuned here"}
    return [section("Does it move as asked?", text), table(["", *(names.get(n, n) for n in motion), "bar"], rows)]


def _dataset_part(dataset: DatasetIndex, edges: Sequence[float] | None = None) -> list[str]:
    """Totals, the motion buckets where their ``edges`` are given, and what was refused: one row per stage and reason,
    with an example."""
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
    if edges is None:
        return [section("Data", text), reasons]
    buckets = chart(motion_histogram(dataset, edges), "Motion buckets of the samples, from their stored SSIM.")
    return [section("Data", text), f'<div class="pair">{buckets}<div>{reasons}</div></div>']


def _sample_table(samples: Sequence[Sample]) -> str:
    """One row per prompt: the image, then its videos by what was asked."""
    asked = list(dict.fromkeys(sample.controls for sample in samples))
    header = "".join(f"<th>{html.escape(controls)}</th>" for controls in asked)
    rows = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        own = {sample.controls: sample for sample in samples if sample.prompt == prompt}
        image = data_uri(image_png(next(iter(own.values())).image), "image/png")
        cells = "".join(f"<td>{video(own[each].video)}</td>" if each in own else "<td></td>" for each in asked)
        text = html.escape(prompt)
        rows.append(f'<tr><td><img src="{image}" alt="{text}"><span class="note">{text}</span></td>{cells}</tr>')
    return f'<table class="samples"><tr><th>image and prompt</th>{header}</tr>{"".join(rows)}</table>'


def _served(facts: DemoFacts) -> str:
    rows = [[html.escape(key), html.escape(str(value))] for key, value in facts.serving.items()]
    return f'<div class="pair"><div>{video(facts.served)}</div><div>{table(["field", "value"], rows)}</div></div>'
