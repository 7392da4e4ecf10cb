"""Rendered clips: the same bytes for the same seed, and pixels that move as their sidecar says."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.synthetic import DIRECTIONS, PAINTERS, clip_kind, render_clip, render_clips
from cinemo.media.video import probe

KINDS = list(PAINTERS)


def clip_of(kind: str, nth: int = 0) -> int:
    return [index for index in range(120) if clip_kind(index) == kind][nth]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_pixels_and_another_does_not(kind: str) -> None:
    first, second, other = (render_clip(seed, clip_of(kind), frames=8) for seed in (3, 3, 4))
    assert first.motion["kind"] == kind
    np.testing.assert_array_equal(first.frames_FHWC, second.frames_FHWC)
    assert (first.caption, first.motion) == (second.caption, second.motion)
    assert not np.array_equal(first.frames_FHWC, other.frames_FHWC)


@pytest.mark.parametrize("nth", range(4))
def test_a_pan_moves_its_content_as_declared(nth: int) -> None:
    clip = render_clip(0, clip_of("pan", nth), frames=9)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in clip.frames_FHWC]
    window = cv2.createHanningWindow(gray[0].shape[::-1], cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(gray[0], gray[8], window)
    declared = np.array(clip.motion["content_px_per_frame"]) * 8
    np.testing.assert_allclose([x, y], declared, atol=0.35 + 0.05 * np.abs(declared).max())


@pytest.mark.parametrize("nth", range(6))
def test_an_object_moves_as_its_caption_says(nth: int) -> None:
    clip = render_clip(1, clip_of("object", nth), frames=20)
    assert f"{clip.motion['speed']} {clip.motion['direction']}" in clip.caption
    x, y = clip.motion["object_px_per_frame"]
    named = DIRECTIONS[clip.motion["direction"]]
    assert np.dot((x, y), named) / np.hypot(x, y) == pytest.approx(1, abs=1e-3)
    # Only where the object was or is does anything change.
    changed = np.abs(clip.frames_FHWC[0].astype(int) - clip.frames_FHWC[-1]).max(-1) > 24
    assert 0 < changed.mean() < 0.6


def test_scores_cover_still_to_fast() -> None:
    scores = []
    for index in range(18):
        frames_FHWC = render_clip(5, index, frames=49).frames_FHWC[::3]
        scores.append(
            mean_adjacent_ssim(np.stack([cv2.resize(f, (96, 64), interpolation=cv2.INTER_AREA) for f in frames_FHWC]))
        )
    assert max(scores) > 0.99
    assert min(scores) < 0.75


def test_files_carry_captions_and_true_motion(tmp_path: Path) -> None:
    manifest = render_clips(tmp_path, count=3, seed=2, size=(64, 96), frames=50)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len({row["clip_id"] for row in rows}) == 3
    for row in rows:
        info = probe(tmp_path / row["uri"])
        assert (info.codec, info.frames, info.height, info.width, info.fps) == ("h264", 50, 64, 96, 24)
        assert json.loads((tmp_path / f"{row['clip_id']}.motion.json").read_text())["caption"] == row["caption"]
