"""``report.html`` of a dataset: how much its clips move, which were refused and why, and what the run cost."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.config import MOTION_BUCKETS, DataConfig
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.precompute.wording import predicted_rows
from cinemo.evaluation.dataset_flow import flow_section
from cinemo.evaluation.dataset_scores import scores_section
from cinemo.evaluation.figures import contact_sheet, count_bars, duration_bars, motion_histogram, score_histogram
from cinemo.evaluation.page import chart, code, pair, picture, section, table, tiles, write_page
from cinemo.media.motion import UNIFORM_EDGES, motion_bucket
from cinemo.media.sources import fetched
from cinemo.media.video import read_frames
from cinemo.types import ClipError, InputError, RunError

REPORT = "report.html"
SHEET_CLIPS = 6
_SHEET_FRAMES = 8
_EXAMPLES = 3
_LEDGERS = 200  # with refusals that are read for examples; the counts are those of all
_READERS = 16
_RUN = re.compile(r'<script type="application/json" id="run">(.*?)</script>', re.DOTALL)
_RUN_KEYS = ("clips", "done", "seconds", "clips_per_second", "stage_seconds", "capacity", "samples", "bytes", "shards")


def write_dataset_report(uri: str, summary: Mapping[str, Any]) -> str | None:
    """Write ``<uri>/report.html``; it keeps the figures of the last run that had something to do.

    Args:
        uri: a finished dataset.
        summary: what `cinemo.data.precompute.graph.run` returned.

    Returns:
        The page, or None where the dataset has no samples to report on.
    """
    place = storage.join(uri, REPORT)
    try:
        dataset = DatasetIndex.load(uri)
    except InputError:
        return None
    try:
        before = storage.read_bytes(place).decode()
    except FileNotFoundError:
        before = ""
    run: dict[str, Any] | None = {key: summary.get(key) for key in _RUN_KEYS}
    if not summary["done"]:
        found = _RUN.search(before)
        run = json.loads(html.unescape(found[1])) if found else None
    kept = html.escape(json.dumps(run), quote=False)
    body = [
        *_totals(dataset, run),
        *_shapes(dataset),
        *_motion(dataset),
        *flow_section(dataset),
        *scores_section(dataset),
        *_sheets(dataset),
        *_refused(dataset, summary["reasons"]),
        *_timings(run),
        *_predicted(uri, {**summary, **(run or {})}),
        *_origin(dataset),
        f'<script type="application/json" id="run">{kept}</script>',
    ]
    return write_page(place, f"dataset {uri.rstrip('/').rsplit('/', 1)[-1]}", body, before)


def equal_population_edges(histogram: np.ndarray, buckets: int = MOTION_BUCKETS) -> list[float]:
    """SSIM values that cut samples into ``buckets`` of as equal a size as the scores allow, strictly ascending.

    Args:
        histogram: samples in equal bins over 0..1; within a bin they are taken as spread evenly.
    """
    counts = np.asarray(histogram, np.float64)
    # A share of a sample in every bin makes the sum rise everywhere, so that its inverse is defined.
    below = np.concatenate([[0.0], np.cumsum(counts + counts.sum() * 1e-9)])
    wanted = np.arange(1, buckets) / buckets * below[-1]
    edges = np.interp(wanted, below, np.linspace(0, 1, len(below)))
    ascending: list[float] = []
    for place, edge in enumerate(edges):
        highest = 1 - (len(edges) - place) * 1e-5
        lowest = ascending[-1] + 1e-5 if ascending else 1e-5
        ascending.append(round(float(min(max(edge, lowest), highest)), 5))
    return ascending


def _totals(dataset: DatasetIndex, run: Mapping[str, Any] | None) -> list[str]:
    info = dataset.info
    clips = info.get("clips", info["samples"] + info["quarantined"])
    size = sum(dataset.table["bytes"].to_pylist())
    shown = {
        "clips": f"{clips:,}",
        "samples": f"{info['samples']:,}",
        "refused": f"{info['quarantined']:,} ({info['quarantined'] / max(1, clips):.1%})",
        "shards": f"{len(dataset.shards):,}",
        "size": _size(size),
    }
    if run:
        shown["this run"] = f"{run['clips_per_second']:.2f} clips/s"
    height, width = info["size"]
    each = f"{info['frames']} frames at {width}×{height} per sample"
    if len(info.get("shapes", ())) > 1:
        each = f"Samples of {len(info['shapes'])} shapes"
    lead = (
        f"{each}, kept as latents with caption and raw motion score: "
        "how much the clips move, which were refused and why, and what the last run cost."
    )
    title = html.escape(dataset.uri.rstrip("/").rsplit("/", 1)[-1])
    return [f"<h1>Dataset {title}</h1>", f'<p class="lead">{html.escape(lead)}</p>', tiles(shown)]


def _shapes(dataset: DatasetIndex) -> list[str]:
    """How many samples have which shape, where there are several."""
    shapes = dataset.info.get("shapes", ())
    if len(shapes) < 2:
        return []
    counts = {f"{one['size'][1]}×{one['size'][0]}, {one['frames']} frames": one["samples"] for one in shapes}
    text = (
        "Each clip has the shape of the nearest aspect ratio, of those the longest that it has frames for. A shard, "
        "and a batch of a training, is of one shape."
    )
    return [section("Shapes", text), chart(count_bars(counts, "samples"), "Samples by shape.", narrow=True)]


def _motion(dataset: DatasetIndex) -> list[str]:
    """The scores, and two ways to cut them into buckets."""
    own = [float(edge) for edge in dataset.info["bucket_edges"]]
    equal = equal_population_edges(dataset.ssim_histogram)
    sets: dict[str, Sequence[float]] = {"uniform": UNIFORM_EDGES, "equal": equal}
    if own != list(UNIFORM_EDGES):
        sets["in use"] = own
    text = (
        "The motion score is the mean SSIM of adjacent frames: 1 is a still picture. Training sees it as one of 20 "
        "buckets, larger = more motion. Uniform edges are the paper's; equal edges put the same number of "
        "samples in every bucket. Scores are stored raw, so nothing is encoded again when the edges change."
    )
    equal_chart = motion_histogram(dataset, equal), "Equal-population edges, made from this dataset's scores."
    used = "in use" if own == list(UNIFORM_EDGES) else "not in use here"
    setting = "data.bucket_edges=[" + ",".join(f"{edge:g}" for edge in equal) + "]"
    return [
        section("Motion", text),
        chart(score_histogram(dataset, sets), "Samples by motion score, with the bucket edges."),
        pair((motion_histogram(dataset, UNIFORM_EDGES), f"Uniform edges (the paper's), {used}."), equal_chart),
        *([chart(motion_histogram(dataset), "The edges in use.", narrow=True)] if "in use" in sets else []),
        f'<p class="note">To use the equal-population edges:</p><pre>{html.escape(f"--set {setting}")}</pre>',
    ]


def _sheets(dataset: DatasetIndex) -> list[str]:
    """The clips at both ends, decoded once more from their sources."""
    parts = []
    for title, text, largest in (
        ("The stillest clips", "The highest scores. Title cards, slides and frozen video show up here.", True),
        ("The clips that move most", "The lowest scores. Cuts, flicker and shaking cameras show up here.", False),
    ):
        rows = _extreme(dataset, largest)
        videos, labels, gone = [], [], []
        for row in rows:
            try:
                videos.append(_source_frames(row, dataset))
            except (ClipError, InputError, RunError, OSError) as error:
                gone.append(f"{row['clip_id']} ({error})")
                continue
            bucket = motion_bucket(row["ssim"], dataset.info["bucket_edges"])
            labels.append(f"{row['clip_id']} SSIM {row['ssim']:.3f}, bucket {bucket}")
        parts.append(section(title, text))
        if videos:
            parts.append(picture(contact_sheet(videos, labels, _SHEET_FRAMES, 128)))
        if gone:
            parts.append(
                f'<p class="note">Left out because the source cannot be read: {html.escape("; ".join(gone))}</p>'
            )
    return parts


def _extreme(dataset: DatasetIndex, largest: bool) -> list[dict[str, Any]]:
    """Metadata of the clips with the largest or smallest SSIM, from no more shards than clips are shown."""
    sign = -1 if largest else 1
    column = dataset.table["ssim_max" if largest else "ssim_min"].to_pylist()
    ends = sorted(
        (sign * score, shard) for score, shard in zip(column, dataset.shards, strict=True) if score is not None
    )
    found: list[dict[str, Any]] = []
    for _, shard in ends[:SHEET_CLIPS]:
        found += _metadata(dataset, shard)
    found.sort(key=lambda row: (sign * row["ssim"], row["clip_id"], row["view"]))
    one_view = {row["clip_id"]: row for row in reversed(found)}
    return sorted(one_view.values(), key=lambda row: (sign * row["ssim"], row["clip_id"]))[:SHEET_CLIPS]


def _metadata(dataset: DatasetIndex, shard: int) -> list[dict[str, Any]]:
    """What the samples of a shard say of themselves, and their ``video_shape``."""
    uri = dataset.uri
    members = storage.read_json(shards.record_uri(uri, shard))["members"]
    tar = shards.tar_uri(uri, shard)
    shape = shards.pixels(members["array_shape"]) if members["keys"] else None
    with ThreadPoolExecutor(_READERS if storage.is_remote(uri) else 1) as pool:
        texts = pool.map(lambda *place: storage.read_bytes(tar, *place), members["json_offset"], members["json_size"])
        return [json.loads(text) | {"video_shape": shape} for text in texts]


def _source_frames(row: Mapping[str, Any], dataset: DatasetIndex) -> np.ndarray:
    """Some frames of a sample out of its source, ``FHWC``, cropped as the sample is."""
    frames, height, width = row["video_shape"]
    steps = np.linspace(0, frames - 1, _SHEET_FRAMES).round().astype(int)
    indices = [int(row["start_frame"] + step * row["frame_interval"]) for step in steps]
    larger = max(1, -(-160 // min(height, width)))
    data = DataConfig.model_validate(dataset.info["recipe"]["data"]) if "recipe" in dataset.info else DataConfig()
    with fetched(row["uri"]) as path:
        return read_frames(path, indices, (larger * height, larger * width), data.decoder)


def _refused(dataset: DatasetIndex, reasons: Mapping[str, int]) -> list[str]:
    if not reasons:
        return [section("Refused clips", "None.")]
    counts = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    numbers = dataset.table["shard"].to_pylist()
    with_some = [shard for shard, n in zip(numbers, dataset.table["quarantined"].to_pylist(), strict=True) if n]
    examples: dict[str, list[Any]] = {}
    for shard in with_some[:_LEDGERS]:
        for refusal in shards.read_ledger(dataset.uri, shard):
            examples.setdefault(refusal.reason, []).append(refusal)
    rows = []
    for reason in counts:
        for place, refusal in enumerate(examples.get(reason, [])[:_EXAMPLES]):
            first = [html.escape(refusal.stage), html.escape(reason)] if not place else ["", ""]
            rows.append([*first, code(refusal.uri), html.escape(refusal.detail)])
    text = "By reason, with examples. Once the cause is fixed, --retry-quarantine REASON tries them again."
    return [
        section("Refused clips", text),
        chart(count_bars(counts), "Refused clips by reason.", narrow=True),
        table(["stage", "reason", "clip", "detail"], rows),
    ]


def _timings(run: Mapping[str, Any] | None) -> list[str]:
    if not run:
        return []
    done, elapsed = max(1, run["done"]), max(run["seconds"], 1e-9)
    rows = []
    for stage, seconds in run["stage_seconds"].items():
        places = (run["capacity"] or {}).get({"score": "decode"}.get(stage, stage))
        share = f"{seconds / elapsed / places:.0%} of {places:g}" if places else "-"
        rows.append([stage, f"{seconds:,.1f} s", f"{1000 * seconds / done:,.1f} ms", share])
    text = (
        f"{run['done']:,} clips in {run['seconds']:,.0f} s from command to finished dataset, including the start of "
        "the workers. Seconds are summed over processes; the busy share is relative to all processes a stage may have."
    )
    return [
        section("Where the time went", text),
        '<div class="pair">'
        + chart(duration_bars(dict(run["stage_seconds"])), "Seconds summed over all processes, by stage.")
        + f"<div>{table(['stage', 'seconds', 'per clip', 'busy'], rows)}</div></div>",
    ]


def _predicted(uri: str, summary: Mapping[str, Any]) -> list[str]:
    """Predicted against actual, where the run was planned."""
    rows = predicted_rows(uri, summary)
    text = "What --plan expected of this run (low, high: the range it gave), and how it turned out."
    cells = [[html.escape(value) for value in row] for row in rows]
    names = ["what", "predicted", "low", "high", "actual"]
    return [section("Predicted and actual", text), table(names, cells)] if rows else []


def _origin(dataset: DatasetIndex) -> list[str]:
    info = dataset.info
    covers = [[html.escape(key), code(_short(value))] for key, value in info.get("computed_from", {}).items()]
    recipe = json.dumps(info.get("recipe", {}), indent=2, sort_keys=True)
    return [
        section("What it is", "The fingerprint covers everything that the bytes of a sample depend on."),
        f"<p>Fingerprint {code(info['fingerprint'])}</p>",
        table(["covered by the fingerprint", "value"], covers) if covers else "",
        f"<details><summary>Recipe</summary><pre>{html.escape(recipe)}</pre></details>",
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(itertools.islice(text, 200))


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
