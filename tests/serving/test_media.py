"""Files of jobs in a directory and on a real S3 protocol server."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from faulty_s3 import FaultyS3

from cinemo import storage
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import JobStore, QueueLimits
from cinemo.serving.store.media import MediaStore, image_name, video_name

JOB, OTHER = "video_" + "1" * 24, "video_" + "2" * 24
_places = itertools.count()


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3)])
def media(request: pytest.FixtureRequest, tmp_path: Path) -> MediaStore:
    if request.param == "directory":
        return MediaStore(str(tmp_path / "media"))
    request.getfixturevalue("s3_endpoint")
    return MediaStore(f"s3://cinemo-test/media-{next(_places)}/")


def test_files_are_written_read_and_removed(media: MediaStore) -> None:
    media.write(image_name(JOB), b"pixels")
    with media.writing(video_name(JOB, 1)) as path:
        assert path.suffix == ".mp4", "writers choose the container by it"
        path.write_bytes(b"0123456789")
    media.write(image_name(OTHER), b"")
    assert media.read(image_name(JOB)) == b"pixels"
    assert media.size(video_name(JOB, 1)) == 10
    media.remove_file(video_name(JOB, 2))
    media.remove(JOB)
    media.remove(JOB)
    for name in (image_name(JOB), video_name(JOB, 1)):
        with pytest.raises(FileNotFoundError):
            media.read(name)
    assert media.read(image_name(OTHER)) == b""
    media.remove_file(image_name(OTHER))
    assert storage.names(media.uri) == []


def test_ranges_are_answered_piece_by_piece(media: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cinemo.serving.store.media._PIECE_BYTES", 4)
    name = video_name(JOB, 1)
    media.write(name, b"0123456789")
    assert list(media.pieces(name)) == [b"0123", b"4567", b"89"]
    assert list(media.pieces(name, 3, 5)) == [b"3456", b"7"]
    assert list(media.pieces(name, 8, 100)) == [b"89"]
    assert list(media.pieces(name, 10)) == []
    with pytest.raises(FileNotFoundError):
        media.pieces(video_name(JOB, 2))


def test_a_writer_that_fails_leaves_nothing(media: MediaStore) -> None:
    def fail() -> None:
        with media.writing(video_name(JOB, 1)) as path:
            path.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert storage.names(media.uri) == []


@pytest.mark.parametrize(
    "name", ["", "image", "../x/image", f"{JOB}/../image", f"{JOB}/..", "video_x/image", f"{JOB}/a/b"]
)
def test_names_lead_nowhere_else(media: MediaStore, name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a job's file"):
        media.write(name, b"")


def test_only_a_directory_has_local_paths(media: MediaStore) -> None:
    media.write(image_name(JOB), b"pixels")
    path = media.local_path(image_name(JOB))
    assert (path is None) == media.is_remote
    assert path is None or path.read_bytes() == b"pixels"


def test_old_files_are_told_by_job(media: MediaStore) -> None:
    media.write(image_name(JOB), b"")
    media.write(video_name(JOB, 1), b"")
    storage.write_bytes(storage.join(media.uri, "notes.txt"), b"not ours")
    assert media.old(60) == {}
    time.sleep(1.1)  # S3 tells whole seconds
    assert {job_id: sorted(names) for job_id, names in media.old(0).items()} == {
        JOB: [image_name(JOB), video_name(JOB, 1)]
    }


@pytest.mark.slow
@pytest.mark.s3
def test_jobs_with_their_media_on_s3_through_its_faults(s3_faults: FaultyS3, tmp_path: Path) -> None:
    media = MediaStore(f"s3://cinemo-test/media-{next(_places)}")
    limits = QueueLimits(keep_seconds=0, stray_seconds=1)
    database = Database(f"sqlite:///{tmp_path}/state.sqlite")
    store = JobStore(database, media, limits)
    s3_faults.meet({"500": 0.1, "503": 0.1, "drop": 0.1, "lose_reply": 0.1}, seed=3)
    store.submit({}, b"pixels")
    [job] = store.claim("a", 1)
    assert media.read(image_name(job.id)) == b"pixels"
    with media.writing(video_name(job.id, 1)) as path:
        path.write_bytes(b"video")
    media.write(image_name(OTHER), b"of no job")
    assert store.complete(job, video_name(job.id, 1))
    assert b"".join(media.pieces(video_name(job.id, 1))) == b"video"
    time.sleep(2.1)
    assert store.sweep() == 1
    s3_faults.meet()
    assert storage.names(media.uri) == []
    database.close()


@pytest.mark.s3
def test_a_sweep_goes_on_while_the_media_cannot_be_removed(s3_faults: FaultyS3, tmp_path: Path) -> None:
    """The rows go; their files are strays, which a later sweep finds."""
    media = MediaStore(f"s3://cinemo-test/media-{next(_places)}")
    database = Database(f"sqlite:///{tmp_path}/state.sqlite")
    store = JobStore(database, media, QueueLimits(stray_seconds=0))
    job = store.submit({}, b"pixels")
    store.cancel(job.id)
    s3_faults.meet({"403": 1.0})
    assert store.delete(job.id)
    s3_faults.meet()
    assert media.read(image_name(job.id)) == b"pixels"
    time.sleep(1.1)
    store.sweep()
    assert storage.names(media.uri) == []
    database.close()
