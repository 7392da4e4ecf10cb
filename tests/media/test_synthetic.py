"""Rendered clips: the same bytes for the same seed, pixels that move as declared, and a truth that fits the pixels."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cinemo.media.motion import mean_adjacent_ssim, motion_bucket
from cinemo.media.synthetic import (
    CLIP_FRAMES,
    DIRECTIONS,
    PAINTERS,
    clip_kind,
    render_clip,
    render_clips,
    render_scene,
)
from cinemo.media.video import probe
from cinemo.recipes import load_recipe

KINDS = list(PAINTERS)
SIZE = (64, 96)


def clip_of(kind: str, nth: int = 0) -> int:
    return [index for index in range(120) if clip_kind(index) == kind][nth]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_pixels_and_another_does_not(kind: str) -> None:
    first, second, other = (render_clip(seed, clip_of(kind), frames=8) for seed in (3, 3, 4))
    assert first.motion["kind"] == kind
    np.testing.assert_array_equal(first.frames_FHWC, second.frames_FHWC)
    assert (first.caption, first.motion) == (second.caption, second.motion)
    assert not np.array_equal(first.frames_FHWC, other.frames_FHWC)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_on_its_time_alone(kind: str) -> None:
    scene = render_scene(3, 5, SIZE, kind=kind)
    np.testing.assert_array_equal(scene.frames([0, 40, 80])[1], scene.draw(40))


@pytest.mark.parametrize("nth", range(4))
def test_a_pan_brings_in_what_it_has_taken_out(nth: int) -> None:
    scene = render_scene(0, clip_of("pan", nth))
    (x, y) = scene.motion["content_px_per_frame"]
    moved = scene.draw(3 / max(abs(x), abs(y)))
    rolled = np.roll(scene.draw(0), (round(3 * np.sign(y)), round(3 * np.sign(x))), (0, 1))
    np.testing.assert_allclose(moved.astype(int), rolled, atol=1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "still"])
@pytest.mark.parametrize("index", range(3))
def test_true_flow_carries_each_pixel_to_where_it_is_seen_next(kind: str, index: int) -> None:
    scene = render_scene(2, index, SIZE, kind=kind)
    before, after = 60, 80
    rows, columns = np.mgrid[0 : SIZE[0], 0 : SIZE[1]].astype(np.float32)
    flow = scene.flow(before, after)
    found = cv2.remap(scene.draw(after).astype(np.float32), columns + flow[..., 0], rows + flow[..., 1], 1)
    there = (columns + flow[..., 0] > 0) & (columns + flow[..., 0] < SIZE[1] - 1)
    there &= (rows + flow[..., 1] > 0) & (rows + flow[..., 1] < SIZE[0] - 1)
    off = np.abs(found - scene.draw(before))[there].mean(-1)
    # A shape's edge and the banks of a fluid are drawn over what is behind them.
    assert np.quantile(off, 0.85) < 3, off.mean()
    standing = np.abs(scene.draw(after).astype(np.float32) - scene.draw(before))[there].mean()
    assert off.mean() < 0.5 * standing + 0.5


@pytest.mark.parametrize("index", range(6))
def test_a_shape_moves_as_its_caption_says_over_what_stands_still(index: int) -> None:
    scene = render_scene(1, index, SIZE, kind="object")
    words = f"{scene.motion['speed']} {scene.motion['direction']}" if scene.motion["speed"] else "moves"
    assert words in scene.caption
    x, y = scene.motion["object_px_per_frame"]
    named = DIRECTIONS[scene.motion["direction"]]
    assert np.dot((x, y), named) / np.hypot(x, y) == pytest.approx(1, abs=1e-3)
    assert scene.backdrop is not None
    outside = np.maximum(scene.moving(0), scene.moving(CLIP_FRAMES - 1)) == 0
    np.testing.assert_array_equal(scene.draw(0)[outside], scene.backdrop[outside])
    middle = CLIP_FRAMES / 2  # where it is whole
    inside = scene.moving(middle) > 0.99
    assert inside.any()
    # Shaded about its colour.
    assert np.abs(scene.draw(middle)[inside] - np.array(scene.paint)).max() < 0.15 * 255 + 4


def test_opposites_and_words_for_speed_are_read_out_of_captions() -> None:
    for index in range(48):
        scene = render_scene(9, index, SIZE)
        direction, speed = scene.motion.get("direction"), scene.motion.get("speed")
        if direction is None:
            assert scene.opposite() == scene.caption
            continue
        assert scene.opposite() != scene.caption
        assert speed is None or speed in scene.caption
        assert speed is None or speed not in scene.without_speed()
        assert direction in scene.without_speed()


def test_a_shape_is_in_the_picture_all_the_time_or_nearly() -> None:
    for index in range(30):
        scene = render_scene(4, index, SIZE, kind="object")
        areas = [scene.moving(time).sum() for time in (0, CLIP_FRAMES / 2, CLIP_FRAMES - 1)]
        assert min(areas) > 0.4 * max(areas), scene.caption


def test_rendered_clips_fill_the_buckets_of_the_tiny_recipe() -> None:
    edges, buckets = load_recipe("cinemo-tiny").data.bucket_edges, []
    for index in range(240):
        scene = render_scene(5, index, SIZE)
        times = [5 + (3 + index % 8) * k for k in range(16)]
        buckets.append((scene.motion["kind"], motion_bucket(mean_adjacent_ssim(scene.frames(times)), edges)))
    assert {bucket for kind, bucket in buckets if kind == "still"} == {0}
    counts = np.bincount([bucket for kind, bucket in buckets if kind != "still"], minlength=20)
    assert (counts > 0).sum() >= 18
    assert counts.max() < 0.25 * counts.sum()


def test_files_carry_captions_and_true_motion(tmp_path: Path) -> None:
    manifest = render_clips(tmp_path, count=3, seed=2, size=(64, 96), frames=50)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len({row["clip_id"] for row in rows}) == 3
    for row in rows:
        info = probe(tmp_path / row["uri"])
        assert (info.codec, info.frames, info.height, info.width, info.fps) == ("h264", 50, 64, 96, 24)
        assert json.loads((tmp_path / f"{row['clip_id']}.motion.json").read_text())["caption"] == row["caption"]
