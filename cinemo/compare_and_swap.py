"""Compare-and-swap on small files: of several writers of one version, one succeeds.

Some S3 servers know no conditional PUTs, or ignore the condition: `has_conditions` tries that, and `write_and_look` is
the weaker way that is left there.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid

from cinemo import s3, storage


def read_version(uri: str) -> tuple[bytes, str]:
    """Content and version of a small file, for `write_if`. Raises `FileNotFoundError`."""
    if not storage.is_remote(uri):
        data = storage.read_bytes(uri)
        return data, hashlib.sha256(data).hexdigest()
    while True:
        before = s3.etag(uri)
        data = storage.read_bytes(uri)
        if s3.etag(uri) == before:
            return data, before


def write_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write a small file only if it still has ``version`` (None: does not exist). Of several writers one succeeds.

    Local: guarded by a lock on the directory, which holds among the processes of one machine. S3: a conditional PUT,
    which not every server knows (`has_conditions`).

    Returns:
        The new version, or None where somebody else was first.
    """
    if not storage.is_remote(uri):
        with storage.locked_directory(storage.local_path(uri).parent):
            if version_of(uri) != version:
                return None
            storage.write_bytes(uri, data)
            return version_of(uri)
    try:
        return s3.put_if(uri, data, **({"IfNoneMatch": "*"} if version is None else {"IfMatch": version}))
    except s3.NoBucket:
        raise
    except (FileExistsError, FileNotFoundError):
        with contextlib.suppress(FileNotFoundError):  # maybe only the reply was lost, and it was ourselves
            there, now = read_version(uri)
            return now if there == data else None
        return None


def write_and_look(uri: str, data: bytes, version: str | None, wait: float) -> str | None:
    """`write_if` for S3 servers without conditional PUTs: the last of several writers succeeds, if none of them takes
    longer than ``wait`` seconds from looking at the old version to having written.
    """
    if version_of(uri) != version:
        return None
    with contextlib.suppress(FileExistsError):  # overtaken: what is there tells
        s3.put_if(uri, data)
    time.sleep(wait)
    with contextlib.suppress(FileNotFoundError):
        there, now = read_version(uri)
        return now if there == data else None
    return None


def has_conditions(uri: str) -> bool:
    """Whether `write_if` can be believed under the directory ``uri``: tried with an object there, removed again."""
    if not storage.is_remote(uri):
        return True
    probe = storage.join(uri, f".cinemo-probe-{uuid.uuid4().hex}")

    def refused(data: bytes, **condition: str) -> bool:
        try:
            s3.put_if(probe, data, **condition)
        except FileExistsError:
            return True
        return False

    try:
        refused(b"1", IfNoneMatch="*")
    except s3.NotSupported:
        return False
    try:
        right, wrong = s3.etag(probe), f'"{"0" * 32}"'
        return refused(b"2", IfNoneMatch="*") and refused(b"3", IfMatch=wrong) and not refused(b"4", IfMatch=right)
    except s3.NotSupported:
        return False
    finally:
        with storage.tidying(probe):
            storage.remove_file(probe)


def remove_if(uri: str, version: str) -> None:
    """Remove a small file if it still has ``version``."""
    if storage.is_remote(uri):
        if version_of(uri) == version:
            storage.remove_file(uri)
        return
    with storage.locked_directory(storage.local_path(uri).parent):
        if version_of(uri) == version:
            storage.remove_file(uri)


def version_of(uri: str) -> str | None:
    """The version of a small file, as `read_version` gives it; None where there is none."""
    try:
        return s3.etag(uri) if storage.is_remote(uri) else read_version(uri)[1]
    except FileNotFoundError:
        return None
