"""Frames are exactly those a linear decode shows, whatever the file; faults are named; what is written can be read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.config import DataConfig
from cinemo.media import timeline
from cinemo.media.mp4 import read_metadata, write_video
from cinemo.media.video import cover, decode_clip, draw_view, probe, read_frames
from cinemo.types import Clip, ClipError, InputError

HEIGHT, WIDTH = 64, 96


def noise(frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames that differ from each other everywhere, smooth enough to survive compression."""
    coarse = np.random.default_rng(0).integers(0, 256, (frames, 6, 8, 3), np.uint8)
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in coarse])


def encode(
    path: Path,
    frames_FHWC: np.ndarray,
    codec: str = "libx264",
    pts: list[int] | None = None,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    rotation: int | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames_FHWC.shape[1:3], pix_fmt
        stream.options = {"mbtree": "0", **(options or {})} if codec == "libx264" else options or {}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, frame_HWC in enumerate(frames_FHWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts = pts[number] if pts else number
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def linear(path: Path, wanted: list[int]) -> dict[int, np.ndarray]:
    """The reference: decode from the first packet on and count."""
    found = {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(container.streams.best("video"))):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if number == max(wanted):
                break
    return found


REAL = [
    "bikes.mp4", "bottle_static.mp4", "car_12fps.mp4", "cogvideo_vp9.webm", "dj_video3_vertical.mp4", "dog.mp4",
    "flower_vp8.webm", "juggle.mp4", "mma_test_mpeg4.avi", "people_walking_1080p.mp4", "sam2_promo_60fps.mp4",
    "derived/dog_av1.mp4", "derived/dog_editlist.mp4", "derived/dog_hevc.mp4", "derived/dog_start137.mkv",
    "derived/people_60fps_dup.mp4",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files_frame_exact(real_clips: Path, name: str) -> None:
    """Several drawn views of every file against a decode of everything, counted."""
    path = real_clips / name
    count = probe(path).frames
    plans = []
    for plan in range(3):
        interval, start = draw_view(count, DataConfig(), f"{name} {plan}", 0)
        # One plan near the beginning, so that every file's first and few of its last frames are among the wanted.
        start = start if plan else 0
        plans.append([start + k * interval for k in range(16)])
    expected = linear(path, [index for plan in plans for index in plan])
    for plan in plans:
        for index, frame_HWC in zip(plan, read_frames(path, plan), strict=True):
            np.testing.assert_array_equal(frame_HWC, expected[index], err_msg=f"{name} frame {index}")


@pytest.mark.parametrize(
    ("name", "frames"),
    [("bikes.mp4", 250), ("derived/dog_editlist.mp4", 226), ("mma_test_mpeg4.avi", 164), ("flower_vp8.webm", 150)],
)
def test_frame_count_is_what_a_decoder_shows(real_clips: Path, name: str, frames: int) -> None:
    with av.open(str(real_clips / name)) as container:
        assert sum(1 for _ in container.decode(container.streams.best("video"))) == frames
    assert probe(real_clips / name).frames == frames


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libx264", "mp4", {"g": "12", "bf": "3"}),
        ("libx264", "mkv", {"x264-params": "keyint=10:open-gop=1:bframes=2"}),
        ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20", "b": "200k"}),
        ("libx264", "ts", {"g": "12", "bf": "2"}),
        ("mpeg4", "avi", {"bf": "2", "g": "12"}),
        ("libx264", "mp4", {"x264-params": "keyint=40:bframes=8:b-pyramid=normal:b-adapt=0:ref=6"}),
        ("libx265", "mp4", {"x265-params": "keyint=12:bframes=3:log-level=none:pools=1"}),
    ],
)
def test_written_files_frame_exact(tmp_path: Path, codec: str, suffix: str, options: dict[str, str]) -> None:
    path = encode(tmp_path / f"clip.{suffix}", noise(70), codec, options=options)
    everything = linear(path, list(range(70)))
    assert probe(path).frames == len(everything)
    generator = np.random.default_rng(1)
    for _ in range(6):
        wanted = generator.choice(len(everything), 5).tolist()
        got = read_frames(path, wanted)
        for index, frame_HWC in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(frame_HWC, everything[index])


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_ten_bits_are_the_same_frames(tmp_path: Path, codec: str) -> None:
    options = {"libx264": {"bf": "3", "g": "12"}, "libx265": {"x265-params": "keyint=12:log-level=none:pools=1"}}[codec]
    path = encode(tmp_path / "clip.mp4", noise(40), codec, options=options, pix_fmt="yuv420p10le")
    everything = linear(path, list(range(40)))
    wanted = [0, 7, 13, 25, 39]
    got = read_frames(path, wanted).astype(int)
    # Colours are rounded and interpolated otherwise than by the reference; other frames differ by far more.
    errors = np.abs(got[:, None] - np.stack([everything[k] for k in range(40)])).mean((2, 3, 4))
    assert errors.argmin(1).tolist() == wanted
    assert errors.min(1).max() < 4


def test_variable_frame_rate_counts_frames_not_time(tmp_path: Path) -> None:
    pts = np.cumsum([1 + (k % 7 == 0) * 9 for k in range(60)]).tolist()
    path = encode(tmp_path / "vfr.mkv", noise(60), pts=pts, options={"bf": "2", "g": "15"})
    expected = linear(path, list(range(60)))
    assert probe(path).frames == 60
    np.testing.assert_array_equal(read_frames(path, [8, 33, 59]), np.stack([expected[k] for k in (8, 33, 59)]))


def test_best_of_several_video_streams(tmp_path: Path) -> None:
    """A preview picture in front of the film must not be taken for it."""
    path = tmp_path / "two.mkv"
    preview, film = noise(1, 32, 48), noise(20)
    with av.open(str(path), "w") as container:
        streams = []
        for frames_FHWC in (preview, film):
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *frames_FHWC.shape[1:3], "yuv420p"
            streams.append(stream)
        for stream, frames_FHWC in zip(streams, (preview, film), strict=True):
            for frame_HWC in frames_FHWC:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
            container.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height, info.frames) == (WIDTH, HEIGHT, 20)
    assert read_frames(path, [5]).shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_files_are_upright(tmp_path: Path, rotation: int) -> None:
    frames_FHWC = noise(3)
    plain = read_frames(encode(tmp_path / "plain.mp4", frames_FHWC), [1])
    turned = read_frames(encode(tmp_path / "turned.mp4", frames_FHWC, rotation=rotation), [1])
    np.testing.assert_array_equal(turned[0], np.rot90(plain[0], rotation // 90))
    # The same with a size: the picture fills it the way a player shows it.
    size = (WIDTH, HEIGHT) if rotation % 180 else (HEIGHT, WIDTH)
    sized = read_frames(tmp_path / "turned.mp4", [1], size)
    assert np.abs(sized.astype(int) - turned).mean() < 5


def test_wide_pixels_widen_the_picture(tmp_path: Path) -> None:
    path = encode(tmp_path / "anamorphic.mp4", noise(3), aspect=Fraction(2))
    assert (probe(path).width, probe(path).height) == (2 * WIDTH, HEIGHT)
    frame_HWC = read_frames(path, [1], (HEIGHT, 2 * WIDTH))[0]
    stretched = cv2.resize(read_frames(path, [1])[0], (2 * WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    assert np.abs(frame_HWC.astype(int) - stretched).mean() < 5
    # The same where only the video stream itself says so, and not the container.
    path.write_bytes(path.read_bytes().replace(b"pasp", b"free"))
    assert (probe(path).width, probe(path).height) == (2 * WIDTH, HEIGHT)
    np.testing.assert_array_equal(read_frames(path, [1], (HEIGHT, 2 * WIDTH))[0], frame_HWC)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 64).map(lambda n: 8 * n),
    st.integers(1, 64).map(lambda n: 8 * n),
)
def test_cover_geometry(width: int, height: int, rows: int, columns: int) -> None:
    scaled_width, scaled_height, left, top = cover(width, height, (rows, columns))
    assert scaled_width >= columns
    assert scaled_height >= rows
    assert scaled_width == columns or scaled_height == rows
    assert abs((scaled_width - columns) - 2 * left) <= 1
    assert abs((scaled_height - rows) - 2 * top) <= 1
    # The free side keeps the aspect to within half a pixel.
    if scaled_height == rows and scaled_width > columns:
        assert abs(scaled_width - width * rows / height) <= 0.5
    if scaled_width == columns and scaled_height > rows:
        assert abs(scaled_height - height * columns / width) <= 0.5


def test_shrinking_averages(tmp_path: Path) -> None:
    path = encode(tmp_path / "large.mp4", noise(2, 360, 640), options={"crf": "10"})
    full = read_frames(path, [1])[0].astype(np.float32)
    expected = cv2.resize(full[:, 50:590], (96, 64), interpolation=cv2.INTER_AREA)
    frame_HWC = read_frames(path, [1], (64, 96))[0].astype(np.float32)
    assert np.abs(frame_HWC - expected).mean() < 4
    assert abs(float((frame_HWC - expected).mean())) < 3


@settings(max_examples=200)
@given(st.integers(0, 400), st.integers(2, 20), st.integers(1, 6), st.integers(0, 6), st.text(max_size=8))
def test_drawn_views_lie_inside(available: int, frames: int, low: int, more: int, clip_id: str) -> None:
    data = DataConfig(frames=frames, frame_interval=(low, low + more))
    if available < (frames - 1) * low + 1:
        with pytest.raises(ClipError, match=f"{available} frames, recipe needs {(frames - 1) * low + 1} "):
            draw_view(available, data, clip_id, 0)
        return
    interval, start = draw_view(available, data, clip_id, 0)
    assert low <= interval <= low + more
    assert start >= 0
    assert start + (frames - 1) * interval < available
    assert draw_view(available, data, clip_id, 0) == (interval, start)


def test_intervals_and_starts_are_uniform() -> None:
    drawn = [draw_view(200, DataConfig(), f"clip-{k}", 0) for k in range(8000)]
    intervals = np.bincount([interval for interval, _ in drawn], minlength=11)[3:]
    assert len(intervals) == 8
    assert intervals.sum() == 8000
    np.testing.assert_allclose(intervals / 1000, 1, atol=0.15)
    starts = np.array([start for interval, start in drawn if interval == 5])
    assert starts.max() <= 200 - 76
    np.testing.assert_allclose(starts.mean(), (200 - 76) / 2, rtol=0.08)


def test_views_are_independent_and_seeded() -> None:
    views = {draw_view(500, DataConfig(), "clip", view) for view in range(8)}
    assert len(views) > 4
    assert draw_view(500, DataConfig(seed=1), "clip", 0) != draw_view(500, DataConfig(seed=2), "clip", 0)


def test_a_view_is_the_same_whatever_is_decoded_beside_it(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", noise(90), options={"g": "20", "bf": "2"})
    clip, data = Clip("a", str(path), ""), DataConfig(size=(32, 48))
    eight = decode_clip(clip, data.model_copy(update={"views": 8}))
    for views in (1, 2, 5):
        for ours, theirs in zip(decode_clip(clip, data.model_copy(update={"views": views})), eight, strict=False):
            np.testing.assert_array_equal(ours.frames_FHWC, theirs.frames_FHWC)
            assert (ours.start_frame, ours.frame_interval) == (theirs.start_frame, theirs.frame_interval)
    wanted = {view.start_frame + k * view.frame_interval for view in eight for k in range(16)}
    assert len(wanted) < 8 * 16  # some frames are in several views


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_decode_clip_gives_the_drawn_frames(tmp_path: Path, decoder: Any) -> None:
    path = encode(tmp_path / "clip.mp4", noise(120), options={"g": "20", "bf": "2"})
    data = DataConfig(size=(HEIGHT, WIDTH), views=3, decoder=decoder)
    views = decode_clip(Clip("a", str(path), ""), data)
    reference = read_frames(path, range(120))
    for number, view in enumerate(views):
        assert (view.frame_interval, view.start_frame) == draw_view(120, data, "a", number)
        assert view.fps == 25
        indices = view.start_frame + view.frame_interval * np.arange(16)
        # Colours may differ by the decoder's conversion; neighbouring frames differ by far more.
        errors = np.abs(view.frames_FHWC[:, None].astype(int) - reference[None, indices]).mean((2, 3, 4))
        assert (errors.argmin(1) == np.arange(16)).all()
        assert errors.diagonal().max() < 4


def test_start_and_end_bound_the_usable_frames(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", noise(100), options={"bf": "2"})
    data = DataConfig(size=(HEIGHT, WIDTH), frames=4, frame_interval=(1, 3))
    for clip_id in "abcdefgh":
        view = decode_clip(Clip(clip_id, str(path), "", start=1.0, end=2.0), data)[0]
        assert view.start_frame >= 25
        assert view.start_frame + 3 * view.frame_interval < 50
    with pytest.raises(ClipError, match="3 frames, recipe needs 4"):
        decode_clip(Clip("a", str(path), "", start=1.0, end=1.12), data)
    with pytest.raises(ClipError, match="too_few_frames: 0 frames"):
        decode_clip(Clip("a", str(path), "", start=90.0), data)


def test_faults_have_a_stage_and_a_reason(tmp_path: Path) -> None:
    good = tmp_path / "good.mp4"
    write_video(good, noise(60, 128, 192), 25, crf=1)
    content = good.read_bytes()
    files = {
        "empty.mp4": b"",
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "text.mp4": b"not a video\n" * 100,
        "cut.mp4": content[: len(content) // 2],
        "headless.mp4": content[2000:],
        "huge.y4m": b"YUV4MPEG2 W16000 H16000 F25:1 C420jpeg\nFRAME\n" + bytes(5000),
        "wide.y4m": b"YUV4MPEG2 W60000 H2 F25:1 C420jpeg\nFRAME\n" + bytes(5000),
        "strip.y4m": b"YUV4MPEG2 W16000 H1 F25:1 C420jpeg\n" + (b"FRAME\n" + bytes(32000)) * 60,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    def fault(name: str) -> tuple[str, str]:
        with pytest.raises(ClipError) as caught:
            decode_clip(Clip("x", str(tmp_path / name), ""), DataConfig(size=(64, 96)))
        assert "\n" not in caught.value.detail
        return caught.value.stage, caught.value.reason

    assert fault("nowhere.mp4") == ("open", "missing")
    assert fault("empty.mp4") == ("open", "unreadable")
    assert fault("noise.mp4") == ("open", "unreadable")
    assert fault("text.mp4") == ("open", "unreadable")
    assert fault("headless.mp4") == ("open", "unreadable")
    assert fault("sound.mp4") == ("open", "no_video")
    assert fault("cut.mp4") == ("decode", "truncated")
    assert fault("huge.y4m") == fault("wide.y4m") == ("open", "absurd_dimensions")
    assert fault("strip.y4m") == ("decode", "absurd_dimensions")  # 1024000x64 would cover 96x64


def test_dimensions_that_only_the_stream_admits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of a small picture in front of a large one: the decoder refuses, and a closer look says why."""
    path = encode(tmp_path / "clip.mp4", noise(60, 128, 192))
    content = path.read_bytes()
    size = np.array([192, 128], ">u2").tobytes()
    assert size in content
    path.write_bytes(content.replace(size, np.array([32, 16], ">u2").tobytes()))
    assert len(decode_clip(Clip("a", str(path), ""), DataConfig(size=(64, 96)))) == 1
    monkeypatch.setattr(timeline, "MAX_PIXELS", 100 * 100)
    with pytest.raises(ClipError, match=r"open: absurd_dimensions: .*192x128 pixels"):
        decode_clip(Clip("a", str(path), ""), DataConfig(size=(64, 96)))


def test_a_wrong_extension_is_no_fault(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", noise(60))
    right = decode_clip(Clip("a", str(path), ""), DataConfig(size=(64, 96)))
    wrong = decode_clip(Clip("a", str(path.rename(tmp_path / "clip.avi")), ""), DataConfig(size=(64, 96)))
    np.testing.assert_array_equal(right[0].frames_FHWC, wrong[0].frames_FHWC)


def test_damaged_files_end_in_a_clip_error_or_in_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", noise(60), 25)
    content = (tmp_path / "good.mp4").read_bytes()
    generator = np.random.default_rng(3)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 40):
            damaged[place] = generator.integers(256)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(bytes(damaged))
        try:
            views = decode_clip(Clip("x", str(path), ""), DataConfig(size=(64, 96)))
        except ClipError:
            refused += 1
        else:
            assert views[0].frames_FHWC.shape == (16, 64, 96, 3)
    assert refused


@pytest.mark.parametrize("width", [32, 50, 72, 88, 104, 106, 120, 126])
def test_pictures_that_need_no_scaling_are_whole(tmp_path: Path, width: int) -> None:
    """swscale's own conversion for that case leaves columns of planes unwritten, with whatever the memory held."""
    ramp = np.linspace(40, 215, width)[None, :, None] * np.ones((48, 1, 3))
    frames = np.stack([np.roll(ramp, k, axis=0) for k in range(6)]).astype(np.uint8)
    write_video(tmp_path / "a.mp4", frames, 25, crf=0)
    for size in (None, (48, width)):
        for _ in range(3):
            assert np.abs(read_frames(tmp_path / "a.mp4", range(6), size).astype(int) - frames).max() <= 3


def test_index_outside_the_file(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", noise(5))
    with pytest.raises(ClipError, match="frame 5 was requested"):
        read_frames(path, [0, 5])


def test_write_video_round_trip(tmp_path: Path) -> None:
    frames_FHWC = noise(12)
    path = tmp_path / "new" / "clip.mp4"
    write_video(path, frames_FHWC, 7.5, {"cinemo_settings": '{"prompt": "größer; = \\n"}', "title": "t"})
    info = probe(path)
    assert (info.width, info.height, info.fps, info.frames, info.codec) == (WIDTH, HEIGHT, 7.5, 12, "h264")
    assert read_metadata(path) == {"cinemo_settings": '{"prompt": "größer; = \\n"}', "title": "t"}
    assert np.abs(read_frames(path, range(12)).astype(int) - frames_FHWC).mean() < 6
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_equal_frames_give_equal_files(tmp_path: Path) -> None:
    frames_FHWC = noise(3)
    generator = np.random.default_rng()
    contents = set()
    for _ in range(25):
        write_video(tmp_path / "a.mp4", frames_FHWC, 8)
        contents.add((tmp_path / "a.mp4").read_bytes())
        generator.bytes(int(generator.integers(1000, 3_000_000)))  # other memory for the next one
    assert len(contents) == 1


def test_frames_may_come_a_few_at_a_time(tmp_path: Path) -> None:
    """The file is the same, and what is written is not kept."""
    frames_FHWC = noise(7)
    written: list[weakref.ref[np.ndarray]] = []

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, 7, 2):
            piece_FHWC = frames_FHWC[start : start + 2].copy()
            written.append(weakref.ref(piece_FHWC))
            yield piece_FHWC
            del piece_FHWC
            assert sum(piece() is not None for piece in written) <= 2  # the first says the size

    write_video(tmp_path / "whole.mp4", frames_FHWC, 8)
    write_video(tmp_path / "pieces.mp4", pieces(), 8)
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_write_video_refuses_what_players_cannot_show(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="even sides"):
        write_video(tmp_path / "a.mp4", noise(2, 63, 96), 8)
    with pytest.raises(InputError, match="expected uint8"):
        write_video(tmp_path / "a.mp4", noise(2).astype(np.float32), 8)
    with pytest.raises(InputError, match="fps is 0"):
        write_video(tmp_path / "a.mp4", noise(2), 0)
    with pytest.raises(InputError, match="F >= 1"):
        write_video(tmp_path / "a.mp4", [], 8)
    with pytest.raises(InputError, match="a frame is 64x64, expected 96x64 as the ones before"):
        write_video(tmp_path / "a.mp4", [noise(2, 64, 96), noise(2, 64, 64)], 8)
    assert not list(tmp_path.iterdir())
