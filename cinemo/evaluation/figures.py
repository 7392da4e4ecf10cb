"""Pictures for people: contact sheets (PIL) and figures (matplotlib without a display)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from cinemo.config import MOTION_BUCKETS
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.evaluation.calibration import Calibration
from cinemo.media.motion import motion_bucket

INK, ACCENT, MUTED, GRID = "#1f2933", "#0b7285", "#868e96", "#e9ecef"
_COLORS = (ACCENT, "#e8590c", "#5f3dc4", "#2b8a3e", MUTED)  # of bundles side by side
_TICK_CHARACTERS = 75  # that fit below one of the figures
_STYLE = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.constrained_layout.use": True,
}


def contact_sheet(
    videos: Sequence[np.ndarray], labels: Sequence[str], columns: int = 8, cell_width: int = 160
) -> Image.Image:
    """One row per video (F, H, W, 3) uint8: a label, then up to ``columns`` frames spread over its length."""
    font = ImageFont.load_default(15)
    lines = [_wrap(label, font, 190) for label in labels]
    left, gap = 200, 4
    count = min(columns, max(len(video) for video in videos))
    heights = [round(cell_width * video.shape[1] / video.shape[2]) for video in videos]
    sheet = Image.new("RGB", (left + count * (cell_width + gap), sum(heights) + (len(videos) + 1) * gap), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for video, text, height in zip(videos, lines, heights, strict=True):
        draw.multiline_text((8, top + height / 2), text, fill=INK, font=font, anchor="lm", spacing=5)
        for column, index in enumerate(np.linspace(0, len(video) - 1, count).round().astype(int)):
            picture = Image.fromarray(video[index]).resize((cell_width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + column * (cell_width + gap), top))
        top += height + gap
    return sheet


def animated_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], labels: Sequence[str], cell_width: int = 192
) -> list[Image.Image]:
    """Frames of one picture in which videos (F, H, W, 3) uint8 play side by side: a row for each label, its videos
    under ``titles``. They pause on the first frame and on the last, so that one sees where they begin again."""
    font = ImageFont.load_default(15)
    height, width = rows[0][0].shape[1:3]
    cell = (cell_width, round(cell_width * height / width))
    left, top, gap = 190, 30, 6
    size = (left + len(titles) * (cell[0] + gap), top + len(rows) * (cell[1] + gap))
    count = len(rows[0][0])
    pictures = []
    for index in [0, 0, *range(count), count - 1, count - 1]:
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        for column, title in enumerate(titles):
            middle = left + column * (cell[0] + gap) + cell[0] / 2
            draw.text((middle, top / 2), title, fill=INK, font=font, anchor="mm")
        for row, (label, videos) in enumerate(zip(labels, rows, strict=True)):
            y = top + row * (cell[1] + gap)
            draw.multiline_text(
                (8, y + cell[1] / 2), _wrap(label, font, 175), fill=INK, font=font, anchor="lm", spacing=5
            )
            for column, video in enumerate(videos):
                picture = Image.fromarray(video[index]).resize(cell, Image.Resampling.BICUBIC)
                sheet.paste(picture, (left + column * (cell[0] + gap), y))
        pictures.append(sheet)
    return pictures


def motion_histogram(dataset: DatasetIndex, edges: Sequence[float] | None = None) -> Figure:
    """How many samples fall into each of the 20 motion buckets (larger = more motion); by the dataset's own edges."""
    bins = dataset.ssim_histogram
    middles = (np.arange(len(bins)) + 0.5) / len(bins)
    buckets = [motion_bucket(float(middle), edges or dataset.info["bucket_edges"]) for middle in middles]
    counts = np.bincount(buckets, weights=bins, minlength=MOTION_BUCKETS)
    figure, axes = _figure(6.2, 3.0)
    axes.bar(range(MOTION_BUCKETS), counts, width=0.8, color=ACCENT)
    axes.set(xlabel="motion bucket (larger = more motion)", ylabel="samples", xticks=range(0, MOTION_BUCKETS, 2))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")
    return figure


def score_histogram(dataset: DatasetIndex, edges: dict[str, Sequence[float]]) -> Figure:
    """Samples by mean SSIM, and above them where each named set of bucket edges cuts."""
    bins = dataset.ssim_histogram.reshape(-1, 10).sum(1)
    figure, axes = _figure(12.8, 3.4)
    axes.bar((np.arange(len(bins)) + 0.5) / len(bins), bins, width=0.9 / len(bins), color=ACCENT)
    top = max(1, bins.max())
    for row, (name, values) in enumerate(edges.items()):
        low, high = top * (1.06 + 0.12 * row), top * (1.14 + 0.12 * row)
        axes.vlines(values, low, high, color=INK, linewidth=1.2)
        axes.text(-0.005, (low + high) / 2, name, ha="right", va="center", fontsize=9)
    axes.set(xlabel="mean SSIM of adjacent frames (1 = nothing moves)", ylabel="samples", xlim=(0, 1), ylim=(0, None))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= top and tick == round(tick)])
    axes.grid(visible=False, axis="x")
    return figure


def value_histogram(values: Sequence[float], label: str) -> Figure:
    """Samples by a number from 0 to 1."""
    figure, axes = _figure(6.2, 3.0)
    axes.hist(np.clip(values, 0, 1), bins=50, range=(0, 1), color=ACCENT, rwidth=0.9)
    axes.set(xlabel=label, ylabel="samples", xlim=(0, 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")
    return figure


def speed_scatter(motion: Sequence[float], speeds: Sequence[float]) -> Figure:
    """Samples by 1 - SSIM and by the mean length of their flow (pixels a frame, shorter side 512)."""
    figure, axes = _figure(6.2, 4.0)
    axes.scatter(np.maximum(motion, 1e-4), np.maximum(speeds, 1e-3), s=12, alpha=0.5, color=ACCENT, edgecolors="none")
    axes.set(
        xlabel="1 - mean SSIM of adjacent frames", ylabel="flow, pixels a frame at 512", xscale="log", yscale="log"
    )
    return figure


def count_bars(counts: dict[str, int], of: str = "clips") -> Figure:
    """How often each thing happened: one bar each, in order."""
    figure, axes = _figure(6.2, 0.7 + 0.34 * len(counts))
    bars = axes.barh(list(counts), list(counts.values()), color=ACCENT, height=0.7)
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=of)
    return figure


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> Figure:
    """Training loss over optimiser steps: the reported values, and their running mean over a tenth of the run."""
    figure, axes = _figure(6.2, 3.0)
    axes.plot(steps, losses, color=ACCENT, alpha=0.35, linewidth=1)
    span = max(1, len(losses) // 10)
    smooth = [float(np.mean(losses[max(0, i - span + 1) : i + 1])) for i in range(len(losses))]
    axes.plot(steps, smooth, color=ACCENT, linewidth=2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    return figure


def calibration_curve(calibration: Calibration) -> Figure:
    """Measured motion over the value that was asked for: one thin line per picture, the mean in front, and a band that
    nine of ten videos are in."""
    figure, axes = _by_value(calibration, calibration.motion_PL)
    low, high = calibration.interval_L
    axes.fill_between(range(len(low)), low, high, color=ACCENT, alpha=0.15, linewidth=0)
    if len(calibration.motion_PLS) > 1:  # of one picture it is all that motion can be
        axes.set_ylim(0, 1.05 * max(high.max(), calibration.motion_PL.max()))
    axes.set_ylabel("measured motion (1 - SSIM)")
    return figure


def flow_curve(calibration: Calibration) -> Figure:
    """Mean length of optical flow over the value that was asked for: one thin line per picture, the mean in front."""
    figure, axes = _by_value(calibration, calibration.speed_PLS.mean(2))
    axes.set_ylabel("optical flow (pixels a frame)")
    return figure


def strength_curve(calibrations: Sequence[tuple[str, Calibration]]) -> Figure:
    """Motion over a strength of 0..1, by the inverse map of each: straight where the control obeys.

    Thin lines are pictures of the first. Between values that were measured it is taken to be linear, as the map is.
    """
    figure, axes = _figure(6.2, 3.0)
    strengths = np.linspace(0, 1, 41)
    for number, (name, each) in enumerate(calibrations):
        places = np.arange(len(each.values))
        reached = np.interp(each.curve_L[0] + strengths * each.span, each.curve_L, places)
        motion = np.interp(reached, places, each.mean_L)
        for row in each.motion_PL if number == 0 else ():
            axes.plot(strengths, np.interp(reached, places, row), color=MUTED, alpha=0.3, linewidth=0.7)
        color = _COLORS[number % len(_COLORS)]
        axes.plot(strengths, motion, color=color, linewidth=2.2 if number == 0 else 1.4, label=name)
        axes.plot((0, 1), each.curve_L[[0, -1]], color=color, linewidth=1, linestyle=":")
    axes.set(xlabel="strength", ylabel="measured motion (1 - SSIM)", xlim=(0, 1))
    axes.set_ylim(0, None)
    if len(calibrations) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def duration_bars(seconds: dict[str, float]) -> Figure:
    """Where the time went: one bar per stage, in order."""
    figure, axes = _figure(6.2, 0.5 + 0.34 * len(seconds))
    names = list(seconds)
    bars = axes.barh(names, [seconds[name] for name in names], color=ACCENT, height=0.7)
    axes.bar_label(bars, [f"{seconds[name]:.0f} s" for name in names], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="seconds")
    return figure


def knob_bars(values: Mapping[str, float]) -> Figure:
    """One bar per way to measure, with a line at the first."""
    figure, axes = _figure(9.0, 0.7 + 0.32 * len(values))
    names = list(values)
    bars = axes.barh(names, list(values.values()), color=[ACCENT, *[MUTED] * (len(names) - 1)], height=0.7)
    axes.axvline(values[names[0]], color=ACCENT, linewidth=1, linestyle=":")
    axes.bar_label(bars, [f"{value:.3g}" for value in values.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="distance (logarithmic)", xscale="log", xlim=(min(values.values()) / 2, 2 * max(values.values())))
    return figure


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def image_png(image: Image.Image | np.ndarray) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(width: float, height: float) -> tuple[Figure, mpl.axes.Axes]:
    """A figure of its own (no pyplot, hence no global state and no display)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots()


def _by_value(calibration: Calibration, measured_PL: np.ndarray) -> tuple[Figure, mpl.axes.Axes]:
    figure, axes = _figure(6.2, 3.0)
    places = range(len(calibration.values))
    for row in measured_PL:
        axes.plot(places, row, color=MUTED, alpha=0.4, linewidth=0.8)
    axes.plot(places, measured_PL.mean(0), color=ACCENT, linewidth=2.5, marker="o", markersize=4)
    labels = [f"{value:g}" for value in calibration.values]
    every = math.ceil(len(labels) * (max(map(len, labels)) + 1.5) / _TICK_CHARACTERS)  # labels side by side
    axes.set_xticks(places[::every], labels[::every])
    axes.set_xlabel(calibration.control.replace("_", " "))
    axes.set_ylim(0, None)
    return figure, axes


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, rows: int = 4) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > rows:
        lines = [*lines[: rows - 1], lines[rows - 1] + " ..."]
    return "\n".join(lines)
