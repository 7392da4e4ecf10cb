"""Frame k is the k-th picture that a player shows, also in files that were cut, joined, remuxed or turned."""

from __future__ import annotations

import itertools
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media import video_files
from media.test_video import encode, linear, noise

from cinemo.animate import load_source
from cinemo.config import DataConfig
from cinemo.media import video
from cinemo.media.mp4 import write_video
from cinemo.media.video import decode_clip, probe, read_frames
from cinemo.recipes import load_recipe
from cinemo.types import Clip, ClipError

OPTIONS = {"g": "12", "bf": "2"}


def assert_same_pictures(path: Path, expected_FHWC: np.ndarray, tolerance: float = 6) -> None:
    """All frames, then some of them, which are sought: other frames of noise would differ by 50."""
    count = len(expected_FHWC)
    assert probe(path).frames == count
    assert np.abs(read_frames(path, range(count)).astype(int) - expected_FHWC).mean((1, 2, 3)).max() < tolerance
    for wanted in ([count - 1], [1, count // 2], [count // 3, count - 3]):
        got_FHWC = read_frames(path, wanted)
        assert np.abs(got_FHWC.astype(int) - expected_FHWC[wanted]).mean((1, 2, 3)).max() < tolerance


def copied(source: Path, target: Path, keep_times: bool = True) -> Path:
    """A stream copy; without its times, packets are shown in the order of decoding, as an AVI says it."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in before.demux(stream) if p.size):
            if not keep_times:
                packet.pts = packet.dts = number
                packet.time_base = Fraction(1, 25)
            packet.stream = copy
            after.mux(packet)
    return target


@pytest.mark.parametrize("shown", [(0, 20), (7, 30), (25, 25), (13, 37)])
def test_edit_lists_hide_frames(tmp_path: Path, shown: tuple[int, int]) -> None:
    first, count = shown
    path = encode(tmp_path / "clip.mp4", noise(50), options=OPTIONS)
    whole = read_frames(path, range(50))
    content = path.read_bytes()
    place = content.index(b"elst") + 12  # version, flags, number of entries; then movie time and media time
    movie = struct.unpack(">I", content[(at := content.index(b"mvhd") + 16) : at + 4])[0]
    media = struct.unpack(">I", content[(at := content.index(b"mdhd") + 16) : at + 4])[0]
    begin = struct.unpack(">I", content[place + 4 : place + 8])[0] + first * media // 25
    edit = struct.pack(">II", count * movie // 25, begin)
    path.write_bytes(content[:place] + edit + content[place + 8 :])
    assert_same_pictures(path, whole[first : first + count], 1)
    # decord counts what is hidden, so it is not asked.
    np.testing.assert_array_equal(read_frames(path, [3, 11], (32, 48), "decord"), read_frames(path, [3, 11], (32, 48)))


def test_headers_of_avi_count_what_they_like(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.avi", noise(40), "mpeg4", options={**OPTIONS, "b": "4M"})
    whole = read_frames(path, range(40))
    content = bytearray(path.read_bytes())
    # Twice the frames at twice the rate, as a copy of interlaced video has it.
    strh = content.index(b"strh") + 8
    scale, rate, _, length = struct.unpack("<4I", content[strh + 20 : strh + 36])
    content[strh + 20 : strh + 36] = struct.pack("<4I", scale, 2 * rate, 0, 2 * length)
    path.write_bytes(bytes(content))
    assert_same_pictures(path, whole, 1)


def test_reordered_pictures_without_times_of_their_own(tmp_path: Path) -> None:
    source = encode(tmp_path / "clip.mp4", noise(50), options=OPTIONS)
    whole = read_frames(source, range(50))
    for suffix in ("mkv", "mp4"):
        assert_same_pictures(copied(source, tmp_path / f"remuxed.{suffix}", keep_times=False), whole, 1)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", OPTIONS),
        ("libx264", {"x264-params": "keyint=12:open-gop=1:bframes=2"}),
        ("libx264", {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}),
        ("mpeg2video", {**OPTIONS, "b": "4M"}),
    ],
)
def test_streams_that_begin_anywhere(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    whole = encode(tmp_path / "whole.ts", noise(60), codec, options=options)
    content = whole.read_bytes()
    for packets in (9, 37, 90):
        path = tmp_path / f"late{packets}.ts"
        path.write_bytes(content[188 * packets :])
        with av.open(str(path)) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert 10 < len(shown) < 60
        assert_same_pictures(path, np.stack(shown), 1)


def test_times_that_begin_again_keep_the_order_of_decoding(tmp_path: Path) -> None:
    parts = [encode(tmp_path / f"{k}.ts", video_files.noise(40, 64, 96, k), options=OPTIONS) for k in range(2)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert_same_pictures(joined, np.concatenate([read_frames(part, range(40)) for part in parts]), 1)


@pytest.mark.parametrize("turn", list(video_files.ROTATIONS))
def test_the_whole_display_matrix_is_applied(tmp_path: Path, turn: str) -> None:
    path = encode(tmp_path / "clip.mp4", noise(3))
    plain = read_frames(path, range(3))
    path.write_bytes(video_files.with_matrix(path.read_bytes(), video_files.ROTATIONS[turn]))
    upright = {
        "flipped": plain[:, ::-1],
        "mirrored": plain[:, :, ::-1],
        "transposed": plain.swapaxes(1, 2),
        "transverse": plain[:, ::-1, ::-1].swapaxes(1, 2),
        "clockwise": np.rot90(plain, -1, (1, 2)),
        "anticlockwise": np.rot90(plain, 1, (1, 2)),
        "upside down": plain[:, ::-1, ::-1],
    }[turn]
    np.testing.assert_array_equal(read_frames(path, range(3)), upright)
    for decoder in ("pyav", "decord"):
        sized = read_frames(path, range(3), upright.shape[1:3], decoder)
        assert np.abs(sized.astype(int) - upright).mean() < 5


def test_decord_is_not_asked_for_wide_pixels(tmp_path: Path) -> None:
    path = encode(tmp_path / "anamorphic.mp4", noise(5), aspect=Fraction(2))
    np.testing.assert_array_equal(read_frames(path, [3], (64, 96), "decord"), read_frames(path, [3], (64, 96)))


def test_decord_is_not_asked_for_open_groups_of_pictures(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "open.mp4", noise(60), "libx265", options={"x265-params": "keyint=12:log-level=none:pools=1"}
    )
    for wanted in ([11], [13, 24, 29], [22, 36, 47, 59]):
        got = read_frames(path, wanted, (64, 96), "decord")
        np.testing.assert_array_equal(got, read_frames(path, wanted, (64, 96)))


def test_a_size_that_changes_inside_a_file(tmp_path: Path) -> None:
    small, large = noise(30), noise(30, 128, 192)
    parts = [encode(tmp_path / f"{k}.ts", frames, options=OPTIONS) for k, frames in enumerate((small, large))]
    path = tmp_path / "grows.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = read_frames(path, range(60))
    assert frames.shape == (60, 64, 96, 3)
    assert np.abs(frames[30:].astype(int) - large[:, ::2, ::2]).mean() < 15
    assert read_frames(path, [45]).shape == (1, 128, 192, 3)
    recipe = load_recipe("cinemo-tiny")
    assert load_source(str(path), recipe, 3).shape == (recipe.data.frames, 64, 96, 3)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_missing_bytes_are_what_makes_a_file_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    if suffix == "mp4":
        write_video(path, noise(60, 128, 192), 25, crf=1)
    else:
        encode(path, noise(60, 128, 192), options={"crf": "1"})
    content = path.read_bytes()
    data = DataConfig(size=(64, 96))
    assert decode_clip(Clip("a", str(path), ""), data)
    for share in (0.97, 0.8, 0.3):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ClipError, match=r"^decode: truncated: its frames reach to byte \d+, the file has \d+$"):
            decode_clip(Clip("a", str(path), ""), data)


def test_reasons_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"

    def fault(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(ClipError) as caught:
            decode_clip(Clip("a", str(path), ""), DataConfig(size=(64, 96)))
        return str(caught.value)

    whole = encode(tmp_path / "whole.mp4", noise(60), options=OPTIONS).read_bytes()
    assert whole.index(b"mdat") < whole.index(b"moov")
    assert fault(b"") == "open: unreadable: empty: the file has 0 bytes"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    assert fault(pointer).startswith("open: unreadable: text, not a video: it begins with 'version https://git-lfs")
    unfinished = fault(whole[: whole.index(b"moov") - 4])
    assert unfinished.startswith("open: unreadable: no moov: the index of an mp4 is not in the file, which holds ftyp")
    assert "zeros" in fault(bytes(2000))
    spoilt = bytearray(whole)
    begin, end = whole.index(b"mdat") + 2000, whole.index(b"moov") - 4
    for place in range(begin, end - 200, 400):
        spoilt[place : place + 200] = bytes(200)
    assert "decode: corrupt: corrupt packets " in fault(bytes(spoilt))
    assert fault(bytes(spoilt)).endswith(" of 60")


def test_ordinary_files_are_never_decoded_to_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(video, "count_frames", refuse)
    monkeypatch.setattr("cinemo.media.timeline.count_frames", refuse)
    monkeypatch.setattr("cinemo.media.timeline._shown_first", refuse)
    monkeypatch.setattr(video, "_decode_linear", refuse)
    for suffix, codec, options in (
        ("mp4", "libx264", OPTIONS),
        ("mkv", "libx264", {"bf": "0", "g": "15"}),
        ("ts", "libx264", OPTIONS),
        ("mp4", "mpeg4", {**OPTIONS, "b": "4M"}),
        ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
        ("webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k", "cpu-used": "8"}),
    ):
        path = encode(tmp_path / f"{codec}.{suffix}", noise(40), codec, options=options)
        expected = linear(path, [5, 17, 39])
        got = read_frames(path, [5, 17, 39])
        np.testing.assert_array_equal(got, np.stack([expected[k] for k in (5, 17, 39)]))


@pytest.mark.release
@pytest.mark.slow
def test_files_of_stream_copies_against_ffmpeg(tmp_path: Path) -> None:
    """A hundred drawn files: as many frames as ffmpeg shows, and the same ones, in turn and sought."""
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg on this machine (Debian: apt-get install ffmpeg)")
    generator = np.random.default_rng(0)
    compared, wrong = 0, []
    for done, path in itertools.islice(video_files.Draws(tmp_path, seed=19), 120):
        expected = video_files.shown(path)
        if len(expected) < 5:
            continue  # two cuts left nothing, or what versions of FFmpeg see differently
        compared += 1
        try:
            count = probe(path).frames
            # FFmpeg before 7.1 shows HEVC pictures in front of the first keyframe, of references that it makes up, and
            # AV1 and JPEG pictures that an edit list hides.
            hevc_late = path.suffix == ".ts" and done.startswith("hevc") and "without" in done
            edited = path.suffix in (".mp4", ".mov") and done.startswith(("av1", "mjpeg")) and "cut" in done
            if hevc_late or edited:
                expected = expected[max(0, len(expected) - count) :]
            if count != len(expected):
                wrong.append(f"{path.name}: {done}: {count} frames, ffmpeg shows {len(expected)}")
                continue
            for wanted in (range(count), *(np.sort(generator.choice(count, 4, replace=False)) for _ in range(3))):
                for index, frame_HWC in zip(wanted, read_frames(path, map(int, wanted)), strict=True):
                    same = frame_HWC.shape == expected[index].shape
                    if not (same and np.abs(frame_HWC.astype(int) - expected[index]).mean() < 4):
                        wrong.append(f"{path.name}: {done}: frame {index} of {list(wanted)} is another picture")
        except ClipError as error:
            wrong.append(f"{path.name}: {done}: refused ({error}), ffmpeg shows {len(expected)}")
    assert wrong == []
    assert compared >= 100
