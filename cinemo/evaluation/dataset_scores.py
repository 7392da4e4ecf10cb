"""A dataset report's part on what spoils motion: cuts, bars, still overlays and clips that look alike."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex, Members
from cinemo.evaluation.figures import count_bars, value_histogram
from cinemo.evaluation.page import chart, section
from cinemo.types import InputError, RunError

_SHARDS, _SAMPLES = 64, 4096  # that are read at most
_BARS, _OVERLAY = 0.02, 0.002  # shares of the picture from which a clip is counted
_ALIKE = 3  # bits of 64 in which hashes of pictures that look alike differ at most
_PLAIN = 6  # a hash with fewer ones, or fewer zeros, is that of a picture without structure
_GROUPS = 5


def scores_section(dataset: DatasetIndex) -> list[str]:
    """Nothing where no scores are stored (`cinemo.media.scores`)."""
    if "scores" not in dataset.info.get("computed_from", {}):
        return []
    rows = _rows(dataset)
    if not rows:
        return []
    groups = look_alikes(rows)
    counts = {
        "with a cut": sum(row["cut"] for row in rows),
        "in black bars": sum(max(row["bar_rows"], row["bar_columns"]) >= _BARS for row in rows),
        "under an overlay": sum(row["overlay"] >= _OVERLAY for row in rows),
        "look like another": sum(map(len, groups)),
    }
    text = (
        f"Of {len(rows):,} samples that were read. A cut is a change of shot between two of a sample's frames; an "
        "overlay is an outline that stands still while the camera moves. Nothing was refused: filters use the "
        "numbers that are stored with each sample (ssim_min, cut, cut_change, bar_rows, bar_columns, overlay, "
        "hash_first, hash_middle)."
    )
    named = "; ".join(", ".join(row["clip_id"] for row in group[:4]) for group in groups[:_GROUPS])
    lowest = value_histogram([row["ssim_min"] for row in rows], "lowest SSIM of neighbouring frames")
    return [
        section("What spoils motion", text),
        chart(lowest, "Samples by their lowest SSIM: a cut is low beside a high mean.", narrow=True),
        chart(count_bars(counts), "Samples by what was found.", narrow=True),
        f'<p class="note">{len(groups):,} groups look alike: {html.escape(named)}</p>' if groups else "",
    ]


def look_alikes(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups of samples of different clips, each of which has a frame that looks like one of another; largest first."""
    hashes_N2 = np.array([[row["hash_first"], row["hash_middle"]] for row in rows], np.int64).view(np.uint64)
    ones_N2 = np.bitwise_count(hashes_N2)
    structured_N2 = (ones_N2 >= _PLAIN) & (ones_N2 <= 64 - _PLAIN)
    parent = list(range(len(rows)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for place in range(1, len(rows)):
        far_M22 = np.bitwise_count(hashes_N2[:place, :, None] ^ hashes_N2[place, None, :])
        alike_M22 = (far_M22 <= _ALIKE) & structured_N2[:place, :, None] & structured_N2[place, None, :]
        for other in np.flatnonzero(alike_M22.any((1, 2))).tolist():
            if rows[other]["clip_id"] != rows[place]["clip_id"]:
                parent[root(place)] = root(other)
    groups = defaultdict(list)
    for place, row in enumerate(rows):
        groups[root(place)].append(row)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _rows(dataset: DatasetIndex) -> list[dict[str, Any]]:
    """What is stored of samples in shards at equal distances."""
    places = np.unique(np.linspace(0, len(dataset.shards) - 1, min(_SHARDS, len(dataset.shards))).round().astype(int))
    rows: list[dict[str, Any]] = []
    for place in places.tolist():
        try:
            record = storage.read_json(shards.record_uri(dataset.uri, dataset.shards[place]))
            rows += shards.read_metadata(dataset.uri, dataset.shards[place], Members(**record["members"]))
        except (InputError, RunError, OSError, ValueError):
            continue  # what is damaged is verify's to say
        if len(rows) >= _SAMPLES:
            break
    return rows[:_SAMPLES]
