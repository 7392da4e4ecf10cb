"""One-page HTML reports that need no other file: pictures and videos are inside as data URIs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cinemo.data.dataset.shards import DatasetIndex, read_ledger
from cinemo.evaluation.calibration import Drift
from cinemo.evaluation.figures import (
    calibration_curve,
    contact_sheet,
    data_uri,
    duration_bars,
    flow_curve,
    image_png,
    loss_curve,
    motion_histogram,
    strength_curve,
)
from cinemo.evaluation.measurements import METRICS, Result
from cinemo.evaluation.metrics.estimates import Estimate
from cinemo.evaluation.noise import FIGURES
from cinemo.evaluation.page import (
    chart,
    code,
    mp4_bytes,
    number,
    pair,
    picture,
    section,
    table,
    tiles,
    video,
    write_page,
)
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
    tuned, asked = facts.motion["tuned"], {sample.controls for sample in facts.samples}
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
                **({"higher level, more motion": f"{tuned['bucket_rank']:.2f}"} if "bucket_rank" in tuned else {}),
                "training steps": f"{facts.losses[-1][0]}",
                "total time": f"{sum(facts.seconds.values()) / 60:.1f} min",
            }
        ),
        *motion_part(facts.motion),
        section("Samples", _ONE_LEVEL if asked == {""} else _LEVELS),
        _sample_table(facts.samples),
        f'<p class="note">The same frames side by side:</p>{picture(facts.sheet)}',
        section("Training", "The denoising loss, and where the time went."),
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


_LEVELS = "Each image animated at several levels of motion, with the same seed, from the least to the most."
_ONE_LEVEL = "Each image animated with its prompt. The method has no control of how much moves."


def write_evaluation_report(
    uri: str,
    results: Sequence[Result],
    drifts: Sequence[Drift | None],
    protocol: Mapping[str, Any],
    needed: Mapping[str, str],
    dataset: DatasetIndex | None,
) -> None:
    """The page of ``pipelines/evaluate.py``: metrics with intervals, motion control, and videos to play, of the first
    bundle and of those it is compared with.

    Args:
        drifts: of the first bundle's motion from each other one's.
        protocol: what the figures stand for.
        needed: by metric without weights, what to put where.
        dataset: that the scenes are from; None: pictures of a folder.
    """
    first = results[0]
    title = f"Evaluation of {first.name}"
    obeys = (first.calibration and first.calibration.obedience()) or {}
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{_PICTURES if dataset is None else _CLIPS}</p>',
        tiles(
            {
                "videos": str(protocol["videos"]),
                **{text: number(obeys[name]) for name, text in _OBEYS.items() if name in obeys},
                **{text: _short(first.estimates.get(name)) for name, text in _TILES.items()},
            }
        ),
        *_metrics_part(results, needed),
        *_protocol_part(first, protocol),
        *_control_part(results, drifts),
        *_noise_part(first),
        section("Samples", "What was given, and what was generated from its first frame."),
        _pairs(results),
        f'<p class="note">The same frames side by side:</p>{picture(_sheet(results))}',
        section("Every sample", "Figures of each video."),
        "<details><summary>Show the table</summary>",
        _every_row(first.rows),
        "</details>",
        *([] if dataset is None else _dataset_part(dataset)),
    ]
    write_page(uri, title, body)


_CLIPS = (
    "Measured on samples of a dataset: each was animated from its own first frame, caption and controls like the "
    "clip's, and compared with the clip it came from."
)
_PICTURES = "Measured on pictures, each animated with its prompt. There are no real videos to compare with."
_OBEYS = {
    "r2": "R² of strength and motion",
    "monotone": "share of pictures that obey at every level",
    "coverage": "share of videos in the 90% interval",
}
_TILES = {"first_frame_psnr": "first frame (dB)", "latent_frechet": "latent Fréchet distance", "motion": "motion"}


def _every_row(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))  # some figures are not of every sample
    return table(
        columns, [[html.escape(number(row[name])) if name in row else "-" for name in columns] for row in rows]
    )


def _short(estimate: Estimate | None) -> str:
    return "-" if estimate is None else number(estimate.value)


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    half = "" if estimate.at_half is None else f"; N/2: {number(estimate.at_half)}"
    interval = f"[{number(estimate.low)}, {number(estimate.high)}]{half}"
    return f'{number(estimate.value)} <span class="note">{interval}</span>'


def _metrics_part(results: Sequence[Result], needed: Mapping[str, str]) -> list[str]:
    """One row per metric with a column per bundle; of the first bundle's distances also what they go to."""
    arrows = {"higher": "↑", "lower": "↓", "": ""}
    rows = []
    for metric in METRICS:
        estimate = results[0].estimates.get(metric.name)
        far = None if estimate is None else estimate.extrapolated
        name = f"{html.escape(metric.title)} {arrows[metric.better]}"
        rows.append(
            [
                name,
                *(_with_interval(result.estimates.get(metric.name)) for result in results),
                "-" if far is None else number(far),
            ]
        )
    rows.append(["calls of the network a video", *(str(result.calls) for result in results), "-"])
    rows.append(["passes in them, two where guidance is", *(f"{result.passes:g}" for result in results), "-"])
    rows.append(["seconds a video, on this machine", *(number(result.seconds) for result in results), "-"])
    text = (
        "With 95% intervals: bootstrap over videos of means, spread over halves of the videos for distances between "
        "sets. These fall as videos are added: N/2 is what half of them give, the last column what they go to, if "
        "there are enough videos to tell."
    )
    page = [section("Metrics", text)]
    page.append(table(["metric", *(_named(result) for result in results), "at infinity"], rows))
    if needed:
        entries = "".join(f"<li>{code(name)} {html.escape(text)}</li>" for name, text in needed.items())
        page.append(f"<details><summary>What empty metrics need</summary><ul>{entries}</ul></details>")
    return page


def _named(result: Result) -> str:
    return f"{result.name} ({result.digest[:8]})"


def _protocol_part(first: Result, protocol: Mapping[str, Any]) -> list[str]:
    """The card that every distance needs to mean anything."""
    rows = [[html.escape(str(key).replace("_", " ")), html.escape(_flat(value))] for key, value in protocol.items()]
    for name, identity in first.extractors.items():
        rows.append([f"network: {html.escape(name)}", html.escape(", ".join(map(str, identity.values())))])
    rows.append(["sampling steps", str(first.steps)])
    text = "A distance says nothing without them: the same model stands at different values in different papers."
    return [section("Protocol", text), table(["", ""], rows)]


def _flat(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _control_part(results: Sequence[Result], drifts: Sequence[Drift | None]) -> list[str]:
    calibrated = [(_named(result), result.calibration) for result in results if result.calibration is not None]
    if not calibrated:
        return []
    first = calibrated[0][1]
    pictures, _, seeds = first.motion_PLS.shape
    text = (
        f"{pictures} pictures, each animated at {len(first.values)} values of {first.control.replace('_', ' ')} with "
        f"{seeds} seed{'s' * (seeds > 1)}: generated motion should rise with the value, and be linear in the strength."
    )
    rows = []
    for name, each in calibrated:
        obeys = each.obedience() or {}
        rows.append(
            [
                html.escape(name),
                "-" if each.spearman is None else f"{each.spearman:.3f}",
                *(number(obeys[key]) if key in obeys else "-" for key in ("r2", "r2_of_videos", "coverage")),
                number(each.monotone_share),
                _range(each.dead),
                _range(each.saturated),
            ]
        )
    header = ["bundle", "rank correlation", "R²", "R² of single videos", "in 90% interval", "monotone pictures"]
    page = [
        section("Motion control", text),
        pair(
            (calibration_curve(first), "Measured motion by value. Thin: each picture. Band: nine of ten videos."),
            (
                strength_curve(calibrated),
                "Motion by strength: a straight line is a control that obeys. Thin: each picture of the first.",
            ),
            (flow_curve(first), "Optical flow by value: what SSIM says, by another measure."),
        ),
        table([*header, "dead values", "saturated values"], rows),
    ]
    for result, change in zip(results[1:], drifts, strict=True):
        if change is None and result.calibration is not None:
            text = f"Not compared with {_named(result)}, whose control is another, or was measured at other values."
            page.append(f"<p>{html.escape(text)}</p>")
        if change is not None:
            verdict = change.verdict(_named(result))
            page.append(f"<p>{html.escape(verdict[0].upper() + verdict[1:])}.</p>")
    return page


def _noise_part(first: Result) -> list[str]:
    if not first.noise:
        return []
    text = f"{first.name} with each way to draw its initial noise: same pictures, prompts and seed."
    rows = [
        [html.escape(name), *(_with_interval(figures[figure]) for figure in FIGURES)]
        for name, figures in first.noise.items()
    ]
    return [section("Initial noise", text), table(["", *FIGURES.values()], rows)]


def _range(values: Sequence[float]) -> str:
    return f"{values[0]} to {values[-1]}" if values else "none"


def _pairs(results: Sequence[Result]) -> str:
    """Videos to play: a row per sample, with the clip and what each bundle made of its first frame."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("given", *map(_named, results)))
    rows = []
    for number_, shown in enumerate(results[0].shown):
        made = [result.shown[number_].made_FHWC for result in results]
        cells = "".join(f"<td>{_seen(frames)}</td>" for frames in (shown.real_FHWC, *made))
        note = html.escape(f"{shown.clip_id}: {shown.caption}{_asked(results, number_)}")
        rows.append(f'<tr>{cells}</tr><tr><td colspan="{len(results) + 1}"><span class="note">{note}</span></td></tr>')
    return f'<table class="samples"><tr>{head}</tr>{"".join(rows)}</table>'


def _asked(results: Sequence[Result], number_: int) -> str:
    """What a sample's videos were asked for beside its prompt, of each bundle where there are several."""
    if len(results) == 1:
        return results[0].shown[number_].asked
    named = zip(_apart(results), results, strict=True)
    return "".join(f"; {name}{asked}" for name, result in named if (asked := result.shown[number_].asked))


def _apart(results: Sequence[Result]) -> list[str]:
    """Their names, with the digest where two have the same."""
    names = [result.name for result in results]
    return [_named(result) if names.count(result.name) > 1 else result.name for result in results]


def _seen(frames_FHWC: np.ndarray) -> str:
    """A video to play, or a picture where there is one frame."""
    return video(mp4_bytes(frames_FHWC)) if len(frames_FHWC) > 1 else picture(Image.fromarray(frames_FHWC[0]))


def _sheet(results: Sequence[Result]) -> Image.Image:
    """Of each sample what was given, and what every bundle made of it."""
    videos, labels = [], []
    for number_, given in enumerate(results[0].shown):
        videos.append(given.real_FHWC)
        labels.append(f"{given.clip_id} (given): {given.caption}")
        for name, result in zip(_apart(results), results, strict=True):
            shown = result.shown[number_]
            videos.append(shown.made_FHWC)
            labels.append(f"{name}{shown.asked}")
    return contact_sheet(videos, labels)


def parameters_and_size(facts: DemoFacts) -> str:
    height, width = facts.dataset.info["size"]
    return f"{facts.parameters / 1e6:.1f} million parameters, {width}×{height} pixels"


# What each figure of `cinemo.evaluation.rendered` says, for people.
_MOTION_ROWS = {
    "pan_direction_cosine": "pans: cosine of the flow with the requested direction",
    "pan_speed_rank": "pans: rank correlation of true and achieved speed",
    "pan_flow_gain": "pans: gain of dense flow on the true flow (1 is perfect)",
    "pan_end_point_error": "pans: end-point error of flow, in true lengths (0 is perfect, 1 is standing still)",
    "object_direction_share": "shapes: share that goes the right way",
    "object_iou": "shapes: overlap with the true place at the ninth frame, buckets up to 10",
    "object_flow_gain": "shapes: gain of dense flow",
    "object_end_point_error": "shapes: end-point error of flow",
    "fluid_direction_cosine": "fluids: cosine of the flow with the requested direction",
    "fluid_flow_gain": "fluids: gain of dense flow",
    "fluid_end_point_error": "fluids: end-point error of flow",
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
        sign, bar = BARS.get(name, ("", 0.0))
        shown = (
            ""
            if not sign
            else "≥ twice that"
            if name == "unexplained_opposite_prompt"
            else f"{sign.replace('=', '')}= {bar:g}"
        )
        shown = shown.replace(">=", "≥").replace("<=", "≤")
        rows.append([html.escape(text), *(f"{figures[name]:.3f}" for figures in motion.values()), shown])
    if all("given" in figures for figures in motion.values()):
        for name, text in _GIVEN_ROWS.items():
            if any(name not in figures["given"] for figures in motion.values()):
                continue
            rows.append([html.escape(text), *(f"{figures['given'][name]:.3f}" for figures in motion.values()), ""])
    clips = next(iter(motion.values()))["clips_of_each_kind"]
    text = (
        f"Unseen rendered scenes, {clips} of each kind, whose true motion the renderer knows, as SSIM does not. "
        "Each model is asked for the motion that such a scene has in what it learnt from: rendered frames, or files, "
        "whose compression SSIM counts as more motion."
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
    header = "".join(f"<th>{html.escape(controls or 'video')}</th>" for controls in asked)
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
