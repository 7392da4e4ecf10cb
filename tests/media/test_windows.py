"""Windows of one video: fetched once, decoded in one pass, and each exactly as if it were alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data.small_data import film
from faulty_s3 import FaultyS3
from media import broken_decoders

from cinemo import storage
from cinemo.config import DataConfig
from cinemo.data.dataset import fields
from cinemo.data.precompute import stages
from cinemo.media import timeline, video
from cinemo.media.guard import Guard, Views
from cinemo.media.mp4 import write_video
from cinemo.media.video import decode_views, decode_windows
from cinemo.types import Clip, ClipError

DATA = DataConfig(size=(32, 48), frames=6, frame_interval=(1, 3), views=2, clip_timeout=4, clip_memory=2)
SPANS: list[tuple[float | None, float | None]] = [
    (0.0, 2.0), (1.0, 3.0), (1.0, 3.0), (3.0, 3.1), (2.5, None), (None, None), (9.0, None), (6.0, 8.0)
]  # fmt: skip


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_video(path, film("long", 200), 25)
    return path


def windows(uri: str, spans: list[tuple[float | None, float | None]] = SPANS) -> list[Clip]:
    return [Clip(f"window {number}", uri, "", *span) for number, span in enumerate(spans)]


def alone(path: Path, clip: Clip) -> Views:
    try:
        return decode_views(path, clip, DATA)
    except ClipError as error:
        return error


def assert_equal(found: Views, expected: Views) -> None:
    if isinstance(found, ClipError) or isinstance(expected, ClipError):
        assert str(found) == str(expected)
        return
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.frames_FHWC, theirs.frames_FHWC)
        for name in ("fps", "frame_interval", "start_frame"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.fixture
def demuxed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Packets that are read, and frames that come out of the decoder."""
    counts: Counter[str] = Counter()

    class Counting:
        def __init__(self, container: Any) -> None:
            self.container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def demux(self, *streams: Any) -> Iterator[Any]:
            for packet in self.container.demux(*streams):
                counts["packets"] += 1
                yield packet

    @contextmanager
    def counting(path: Any, header_only: bool = False) -> Iterator[tuple[Any, Any]]:
        counts["opened"] += 1
        with timeline.open_video(path, header_only) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(video, "open_video", counting)
    return counts


def test_each_window_is_as_if_it_were_alone(long_video: Path) -> None:
    clips = windows(str(long_video))
    expected = [alone(long_video, clip) for clip in clips]
    assert sum(isinstance(each, ClipError) for each in expected) == 2
    for found, right in zip(decode_windows(long_video, clips, DATA), expected, strict=True):
        assert_equal(found, right)
    for found, right in zip(Guard(DATA).windows(long_video, clips), expected, strict=True):
        assert_equal(found, right)


def test_decord_takes_one_window_at_a_time(long_video: Path) -> None:
    decord = DATA.model_copy(update={"decoder": "decord"})
    with pytest.raises(ClipError, match="not_in_one_pass"):
        decode_windows(long_video, windows(str(long_video)), decord)


def test_windows_that_overlap_are_one_pass(long_video: Path, demuxed: Counter[str]) -> None:
    clips = windows(str(long_video), [(2.0 + 0.1 * number, 4.0 + 0.1 * number) for number in range(4)])
    for clip in clips:
        decode_views(long_video, clip, DATA)
    apart = demuxed.copy()
    demuxed.clear()
    decode_windows(long_video, clips, DATA)
    # Once all packets for the timeline, and once those up to the last frame.
    assert demuxed["opened"] == 1
    assert demuxed["packets"] <= 2 * 201
    assert apart["opened"] == 4
    assert apart["packets"] > 3 * demuxed["packets"]


def test_damage_sends_every_window_its_own_way(long_video: Path, tmp_path: Path) -> None:
    content = bytearray(long_video.read_bytes())
    start = content.index(b"mdat") + 2000
    for place in range(start, start + 4000, 101):
        content[place] ^= 0x55
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    clips = windows(str(path))
    with pytest.raises(ClipError, match="not_in_one_pass"):
        decode_windows(path, clips, DATA)
    for found, clip in zip(Guard(DATA).windows(path, clips), clips, strict=True):
        assert_equal(found, alone(path, clip))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reason"), [("segfault", "decoder_crash"), ("hang", "decoder_hang")])
def test_a_decoder_that_breaks_in_one_pass_is_believed_of_each_alone(tmp_path: Path, kind: str, reason: str) -> None:
    write_video(tmp_path / "film.mp4", film("a", 100), 25)
    (tmp_path / f"x.{kind}").write_bytes(b"x")
    guard = Guard(DATA.model_copy(update={"clip_timeout": 1}), broken_decoders.decode)
    found = list(guard.windows(tmp_path / f"x.{kind}", windows("x", [(0, 2), (1, 3)])))
    assert [isinstance(each, ClipError) and each.reason for each in found] == [reason, reason]
    assert len(list(guard.windows(tmp_path / "film.mp4", windows("x", [(0, 2), (1, 3)])))) == 2


def rows(clips: list[Clip]) -> pa.Table:
    planned = [
        {
            **{name: getattr(clip, name) for name in ("clip_id", "uri", "caption", "start", "end")},
            "shard": 0, "shard_clips": len(clips), "position": position, "extra": None,
        }
        for position, clip in enumerate(clips)
    ]  # fmt: skip
    return pa.Table.from_pylist(planned, pa.schema(stages._CLIP))


@pytest.mark.s3
def test_four_windows_of_an_object_are_one_get(s3_faults: FaultyS3, long_video: Path) -> None:
    uri = "s3://cinemo-test/windows/long.mp4"
    storage.write_bytes(uri, long_video.read_bytes())
    clips = windows(uri, [(0.0, 2.0), (1.0, 3.0), (3.0, 3.1), (2.0, 4.0)])
    apart = [stages.decode(rows(clips).slice(place, 1), DATA) for place in range(4)]
    s3_faults.meet()
    together = stages.decode(rows(clips), DATA)
    assert dict(s3_faults.seen) == {"GET /cinemo-test/windows/long.mp4?": 1}
    kept = [name for name in together.column_names if not name.endswith("_seconds")]
    assert together.select(kept).equals(pa.concat_tables(apart).combine_chunks().select(kept))
    assert together["reason"].to_pylist() == [None] * 4 + ["too_few_frames"] * 2 + [None] * 2


@pytest.mark.s3
def test_a_missing_object_refuses_each_of_its_windows(s3_faults: FaultyS3) -> None:
    s3_faults.meet()
    decoded = stages.decode(rows(windows("s3://cinemo-test/windows/nowhere.mp4", SPANS[:3])), DATA)
    assert decoded["reason"].to_pylist() == ["missing"] * 6
    assert decoded["view"].to_pylist() == [0, 1] * 3


@pytest.mark.s3
def test_faults_name_the_object_and_no_copy(s3_endpoint: str) -> None:
    uri = "s3://cinemo-test/windows/text.mp4"
    storage.write_bytes(uri, b"no video at all " * 9)
    decoded = stages.decode(rows(windows(uri, SPANS[:2])), DATA).to_pylist()
    assert not any("/tmp" in row["detail"] for row in decoded)


@pytest.mark.s3
def test_fields_of_windows_are_one_get(s3_faults: FaultyS3, long_video: Path) -> None:
    uri = "s3://cinemo-test/windows/fields.mp4"
    storage.write_bytes(uri, long_video.read_bytes())
    samples = [
        {"clip_id": f"c{number}", "uri": uri, "start_frame": 10 * number, "frame_interval": 2} for number in range(4)
    ]
    s3_faults.meet()
    columns = fields._pictures(samples, ["first_frame"], DATA, (4, 6), ())
    assert len([each for each in columns["first_frame"] if each]) == 4
    assert s3_faults.seen.total() == 1
