"""Files on a local disk or on s3://, with one set of functions: atomic writes, ranges, listings.

`size`, `version`, `read_bytes` and `fetch` know gs:// and az:// as well. What S3 answers, and how long it is tried
again, is the matter of `cinemo.s3`; for the other two it is that of `cinemo.clouds`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cinemo import clouds, s3
from cinemo.types import InputError, RunError, local_faults

Buffer = bytes | bytearray | memoryview
_WRITEV_BUFFERS = 1024  # IOV_MAX
_REMOVERS = 16
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"


def is_remote(uri: str) -> bool:
    return re.match(SCHEME + "://", uri) is not None and not uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI. Raises `ValueError` for a remote one."""
    if is_remote(uri):
        raise ValueError(f"{uri} is not a local path")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/") or "/", *parts]) if parts else uri


def exists(uri: str) -> bool:
    return bool(s3.call(uri, "exists", uri)) if is_remote(uri) else os.path.exists(local_path(uri))


def size(uri: str) -> int:
    return int(_call(uri, "info")["size"]) if is_remote(uri) else local_path(uri).stat().st_size


def version(uri: str) -> str:
    """What is another string once the file has other content, as far as its size, ETag or times tell."""
    if is_remote(uri):
        info = _call(uri, "info")
        return json.dumps([info["size"], *(str(info.get(name)) for name in ("ETag", "etag", "LastModified", "mtime"))])
    status = local_path(uri).stat()
    return json.dumps([status.st_size, status.st_mtime_ns, status.st_ino])


def _call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """A method of a remote filesystem that reads."""
    if uri.partition("://")[0] in clouds.PACKAGES:
        return clouds.call(uri, method, *arguments, **options)
    return s3.call(uri, method, uri, *arguments, **options)


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``start``. Raises `FileNotFoundError`."""
    if is_remote(uri):
        end = None if length is None else start + length
        return bytes(_call(uri, "cat_file", start=start or None, end=end))
    try:
        with local_path(uri).open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):  # there can be no such file
            raise FileNotFoundError(errno.ENOENT, error.strerror, uri) from None
        raise


def write_bytes(uri: str, data: Buffer | Sequence[Buffer]) -> None:
    """Write a whole file atomically: a reader sees the old content, or all of the new one.

    Local: a temporary file in the same directory, flushed to disk and renamed. S3: one PUT, or a multipart upload of
    what is large.

    Args:
        data: the content, or the pieces it is made of; they are not joined before they are written.
    """
    pieces = [memoryview(piece).cast("B") for piece in ([data] if isinstance(data, Buffer) else data)]
    if is_remote(uri):
        s3.put(uri, pieces)
        return
    path = local_path(uri)
    with local_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            try:
                _write_pieces(descriptor, pieces)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _write_pieces(descriptor: int, pieces: Sequence[memoryview]) -> None:
    left = [piece for piece in pieces if piece.nbytes]
    while left:
        written = os.writev(descriptor, left[:_WRITEV_BUFFERS])
        done = 0
        while done < len(left) and written >= left[done].nbytes:
            written -= left[done].nbytes
            done += 1
        left = left[done:]
        if written:
            left[0] = left[0][written:]


def abort_uploads(uri: str) -> int:
    """Remove what unfinished multipart uploads under a directory ``uri`` hold; returns how many there were.

    Killed processes leave them behind: no listing shows them, yet they are stored and paid for. Nothing to do locally.
    """
    if not is_remote(uri):
        return 0
    bucket, key = s3.split(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    count = 0
    while True:
        page = s3.call(uri, "call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        found = [upload for upload in page.get("Uploads") or [] if upload["Key"].startswith(prefix)]
        for upload in found:
            try:
                s3.call(uri, "abort_mpu", bucket, upload["Key"], upload["UploadId"])
            except FileNotFoundError:
                continue  # finished or aborted meanwhile
        count += len(found)
        if not found or not page.get("IsTruncated"):
            return count


def read_json(uri: str) -> Any:
    if is_remote(uri):  # one request; s3fs would ask for the size first, to read large files in parallel
        return json.loads(s3.call(uri, "cat_file", uri, max_concurrency=1))
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Atomic, with sorted keys, so that equal values are equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def names(uri: str) -> list[str]:
    """Sorted names directly under a directory; empty where there is none."""
    if is_remote(uri):
        try:
            found = s3.call(uri, "ls", uri, detail=False)
        except FileNotFoundError:
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in found})
    path = local_path(uri)
    return sorted(entry.name for entry in path.iterdir()) if os.path.isdir(path) else []


def remove(uri: str) -> None:
    """Remove a file or a whole directory; one that is not there is no error."""
    if is_remote(uri):
        # One by one: the request that deletes many wants a checksum which some servers do not know.
        remove_file(uri)
        bucket, key = s3.split(uri)
        while page := s3.call(uri, "call_s3", "list_objects_v2", Bucket=bucket, Prefix=f"{key.rstrip('/')}/"):
            with ThreadPoolExecutor(_REMOVERS) as pool:
                list(pool.map(remove_file, [f"s3://{bucket}/{entry['Key']}" for entry in page.get("Contents") or []]))
            if not page.get("IsTruncated"):
                return
        return
    path = local_path(uri)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_file(uri: str) -> None:
    """Remove one file with one request; one that is not there is no error."""
    if is_remote(uri):
        s3.call(uri, "rm_file", uri)
    else:
        local_path(uri).unlink(missing_ok=True)


@contextmanager
def tidying(what: str) -> Iterator[None]:
    """Around the removal of what nobody needs any more: the work is done, so a fault of it is only a warning."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).warning("%s: could not be removed, which harms nothing: %s", what, s3.brief(error))


def sweep(uri: str, *directories: str) -> None:
    """Remove what killed processes were still writing under ``uri`` and some directories in it, if that can be."""
    with tidying(f"{uri}: what killed jobs may have left of unfinished writes"):
        abort_uploads(uri)
        for directory in () if is_remote(uri) else (uri, *(join(uri, name) for name in directories)):
            for name in names(directory):
                if name.startswith(".") and name.endswith(".partial"):
                    remove(join(directory, name))


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Hold a local directory, which is created, against the other processes of this machine."""
    with local_faults(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no such lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def upload(directory: Path, uri: str) -> None:
    """Copy a local directory's content to ``uri`` (existing files of the same name are replaced)."""
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        target = join(uri, *path.relative_to(directory).parts)
        if is_remote(uri):
            s3.call(target, "put_file", str(path), target)
        else:
            write_bytes(target, path.read_bytes())


def listing(uri: str) -> dict[str, tuple[int, str | None]]:
    """Size and ETag of every object under ``uri`` on s3:// (one object, or a directory), by bucket and key."""
    found = s3.call(uri, "find", uri, detail=True)
    return {key: (info["size"], info.get("ETag")) for key, info in found.items() if not key.endswith("/")}


def ages(uri: str) -> dict[str, float]:
    """Seconds since every file under the directory ``uri`` was written, by path within it; empty where there is none.

    By this machine's clock against that of the disk or of S3: good to minutes.
    """
    now = time.time()
    if is_remote(uri):
        prefix = uri.removeprefix("s3://").rstrip("/") + "/"
        found = s3.call(uri, "find", uri, detail=True)
        return {
            key.removeprefix(prefix): now - info["LastModified"].timestamp()
            for key, info in found.items()
            if key.startswith(prefix) and not key.endswith("/")
        }
    root, result = local_path(uri), {}
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                result[path.relative_to(root).as_posix()] = now - status.st_mtime
    return result


def fetch(uri: str, path: Path) -> None:
    """Write the content of a remote file to a local path, with one request where it has less than 50 MB.

    Raises `FileNotFoundError`.
    """
    _call(uri, "get_file", str(path))


def absolute(uri: str) -> str:
    """A URI that means the same in another working directory (Ray workers have their own)."""
    return uri if is_remote(uri) else str(local_path(uri).expanduser().resolve())


def check_writable(uri: str) -> None:
    """Raise `InputError` where nothing can be written under the directory ``uri``; creates it."""
    probe = join(uri, ".cinemo-write-probe")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except (InputError, RunError):
        raise
    except Exception as error:
        raise InputError(f"{uri}: cannot write there ({s3.brief(error)}); choose another place") from None


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """``(filesystem, path)`` for libraries that write through pyarrow; ``(None, path)`` for local ones."""
    if not is_remote(uri):
        return None, absolute(uri)
    import pyarrow.fs

    s3.filesystem(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return pyarrow.fs.S3FileSystem(endpoint_override=endpoint), uri.removeprefix("s3://")
