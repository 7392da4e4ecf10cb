"""Files on a local disk or on s3://, with one set of functions: atomic writes, ranges, retry.

Credentials and endpoint come from the environment as for every AWS tool (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ...). What is not there is a `FileNotFoundError`, what is forbidden an `AccessDenied`. Everything
else that goes wrong on the way to S3 (no answer, 5xx, throttling, a connection that drops) is tried again for
``CINEMO_STORAGE_PATIENCE`` seconds (180 by default) and then a `RunError`: an outage is nobody's bad clip.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cinemo.types import InputError, RunError

PATIENCE = "CINEMO_STORAGE_PATIENCE"
Buffer = bytes | bytearray | memoryview

# An object of less than two parts is one PUT, a larger one a multipart upload: a failed part alone is sent again.
_PART_BYTES = 32 << 20
_PARTS_AT_ONCE = 4
_WRITEV_BUFFERS = 1024  # IOV_MAX
# Answers that no patience mends: the wrong region, a name that cannot be.
_HOPELESS = frozenset({"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "InvalidBucketName", "405"})
_CONDITION_FAILED = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict"})


class AccessDenied(InputError, PermissionError):
    """These credentials may not touch this object; others they may."""


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI. Raises `ValueError` for a remote one."""
    if is_remote(uri):
        raise ValueError(f"{uri} is not local")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/") or "/", *parts]) if parts else uri


@functools.cache
def _s3() -> Any:
    import s3fs

    # botocore tries a request again (standard mode: backs off with jitter, and less when everything fails). What it
    # does not see, above all a body that breaks off, `_call` does: retries of s3fs between the two would multiply.
    filesystem = s3fs.S3FileSystem(
        config_kwargs={
            "retries": {"total_max_attempts": 5, "mode": "standard"},
            "connect_timeout": 5,
            "read_timeout": 60,
        },
        use_listings_cache=False,
        default_cache_type="none",
        skip_instance_cache=True,
    )
    filesystem.retries = 1
    return filesystem


def _remote(uri: str) -> Any:
    scheme = uri.partition("://")[0]
    if scheme != "s3":
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; expected a local path or s3://bucket/key")
    return _s3()


def _call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """A method of the filesystem, again and again while S3 fails in ways that pass."""
    import aiohttp
    import botocore.exceptions as faults
    from botocore.parsers import ResponseParserError

    filesystem = _remote(uri)
    patience = float(os.environ.get(PATIENCE) or 180)
    begun, pause = time.monotonic(), 0.25
    while True:
        try:
            return getattr(filesystem, method)(*arguments, **options)
        except FileExistsError:
            raise  # a condition of `write_if`
        except FileNotFoundError as error:
            # The reply to a finished multipart upload was lost, and it was finished again: the object may be there.
            if _code(error) != "NoSuchUpload":
                raise
            fault: Exception = error
        except (PermissionError, faults.NoCredentialsError, faults.PartialCredentialsError) as error:
            if _code(error) in ("AccessDenied", "403"):
                raise AccessDenied(f"{uri}: access denied ({_brief(error)}); check the bucket's policy") from None
            raise InputError(f"{uri}: {_brief(error)}; check AWS_* in the environment") from None
        except (OSError, faults.BotoCoreError, ResponseParserError, aiohttp.ClientError, TimeoutError) as error:
            if _code(error) in _CONDITION_FAILED:
                raise FileExistsError(f"{uri}: {_brief(error)}") from None
            if _code(error) in _HOPELESS or isinstance(error, faults.ParamValidationError):
                raise InputError(f"{uri}: {_brief(error)}; check bucket, region and endpoint") from None
            fault = error
        waited = time.monotonic() - begun
        if waited > patience:
            raise RunError(
                f"{uri}: storage has failed for {waited:.0f} s ({_brief(fault)}); run the same command again once it "
                f"answers ({PATIENCE} is {patience:g} s)"
            ) from None
        logging.getLogger(__name__).warning("%s: %s, trying again", uri, _brief(fault))
        time.sleep(random.uniform(0, pause))
        pause = min(2 * pause, 15)


def _code(error: BaseException) -> str:
    """S3's code of a translated error: ``NoSuchBucket``, ``SlowDown``, ``503`` ..."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


def exists(uri: str) -> bool:
    return bool(_call(uri, "exists", uri)) if is_remote(uri) else local_path(uri).exists()


def size(uri: str) -> int:
    return int(_call(uri, "info", uri)["size"]) if is_remote(uri) else local_path(uri).stat().st_size


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``start``. Raises `FileNotFoundError`."""
    if is_remote(uri):
        end = None if length is None else start + length
        return bytes(_call(uri, "cat_file", uri, start=start or None, end=end))
    with local_path(uri).open("rb") as file:
        file.seek(start)
        return file.read(-1 if length is None else length)


def write_bytes(uri: str, data: Buffer | Sequence[Buffer]) -> None:
    """Write a whole file atomically: a reader sees the old content, or all of the new one.

    Local: a temporary file in the same directory, flushed to disk and renamed. S3: one PUT, or a multipart upload of
    what is large.

    Args:
        data: the content, or the pieces it is made of; they are not joined before they are written.
    """
    pieces = [memoryview(piece).cast("B") for piece in ([data] if isinstance(data, Buffer) else data)]
    if is_remote(uri):
        _put(uri, _Pieces(pieces))
        return
    path = local_path(uri)
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


class _Pieces:
    """Buffers that look like one to s3fs, which asks for a length and for slices; a slice is a copy."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = pieces
        self.size = sum(piece.nbytes for piece in pieces)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: slice) -> bytes:
        start, stop, _ = wanted.indices(self.size)
        parts, offset = [], 0
        for piece in self.pieces:
            if offset < stop and offset + piece.nbytes > start:
                parts.append(piece[max(0, start - offset) : stop - offset])
            offset += piece.nbytes
        return b"".join(parts)


def _put(uri: str, data: _Pieces) -> None:
    body = data[:] if len(data) < 2 * _PART_BYTES else data
    try:
        _call(uri, "pipe_file", uri, body, chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: {_brief(error)}; create the bucket or choose another one") from None


def put_requests(size: int) -> int:
    """Requests that write an object of so many bytes."""
    return 1 if size < 2 * _PART_BYTES else 2 + -(-size // _PART_BYTES)


def abort_uploads(uri: str) -> int:
    """Remove what unfinished multipart uploads under a directory ``uri`` hold; returns how many there were.

    Killed processes leave them behind: no listing shows them, yet they are stored and paid for. Nothing to do locally.
    """
    if not is_remote(uri):
        return 0
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    prefix = key.rstrip("/") + "/" if key else ""
    count = 0
    while True:
        page = _call(uri, "call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        found = [upload for upload in page.get("Uploads") or [] if upload["Key"].startswith(prefix)]
        for upload in found:
            try:
                _call(uri, "abort_mpu", bucket, upload["Key"], upload["UploadId"])
            except FileNotFoundError:
                continue  # finished or aborted meanwhile
        count += len(found)
        if not found or not page.get("IsTruncated"):
            return count


def read_json(uri: str) -> Any:
    if is_remote(uri):  # one request; s3fs would ask for the size first, to read large files in parallel
        return json.loads(_call(uri, "cat_file", uri, max_concurrency=1))
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Atomic, with sorted keys, so that equal values are equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def names(uri: str) -> list[str]:
    """Sorted names directly under a directory; empty where there is none."""
    if is_remote(uri):
        try:
            found = _call(uri, "ls", uri, detail=False)
        except FileNotFoundError:
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in found})
    path = local_path(uri)
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def remove(uri: str) -> None:
    """Remove a file or a whole directory; one that is not there is no error."""
    if is_remote(uri):
        if exists(uri):
            _call(uri, "rm", uri, recursive=True)
        return
    path = local_path(uri)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_file(uri: str) -> None:
    """Remove one file with one request; one that is not there is no error."""
    if is_remote(uri):
        _call(uri, "rm_file", uri)
    else:
        local_path(uri).unlink(missing_ok=True)


def sweep(uri: str, *directories: str) -> None:
    """Remove what killed processes were still writing under ``uri`` and some directories in it."""
    abort_uploads(uri)
    for directory in () if is_remote(uri) else (uri, *(join(uri, name) for name in directories)):
        for name in names(directory):
            if name.startswith(".") and name.endswith(".partial"):
                remove(join(directory, name))


def read_version(uri: str) -> tuple[bytes, str]:
    """Content and version of a small file, for `write_if`. Raises `FileNotFoundError`."""
    if not is_remote(uri):
        data = read_bytes(uri)
        return data, hashlib.sha256(data).hexdigest()
    while True:
        before = _call(uri, "info", uri)["ETag"]
        data = read_bytes(uri)
        if _call(uri, "info", uri)["ETag"] == before:
            return data, str(before)


def write_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write a small file only if it still has ``version`` (None: does not exist). Of several writers one succeeds.

    Local: guarded by a lock on the directory, which holds among the processes of one machine. S3: a conditional PUT.

    Returns:
        The new version, or None where somebody else was first.
    """
    if not is_remote(uri):
        with locked_directory(local_path(uri).parent):
            if _version(uri) != version:
                return None
            write_bytes(uri, data)
            return _version(uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # maybe only the reply was lost, and it was ourselves
        _call(uri, "call_s3", "put_object", Bucket=bucket, Key=key, Body=data, **condition)
    try:
        there, now = read_version(uri)
    except FileNotFoundError:
        return None
    return now if there == data else None


def remove_if(uri: str, version: str) -> None:
    """Remove a small file if it still has ``version``."""
    if is_remote(uri):
        if _version(uri) == version:
            remove_file(uri)
        return
    with locked_directory(local_path(uri).parent):
        if _version(uri) == version:
            remove_file(uri)


def _version(uri: str) -> str | None:
    try:
        return read_version(uri)[1]
    except FileNotFoundError:
        return None


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Hold a local directory, which is created, against the other processes of this machine."""
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
            _call(target, "put_file", str(path), target)
        else:
            write_bytes(target, path.read_bytes())


def listing(uri: str) -> dict[str, tuple[int, str | None]]:
    """Size and ETag of every object under ``uri`` on s3:// (one object, or a directory), by bucket and key."""
    found = _call(uri, "find", uri, detail=True)
    return {key: (info["size"], info.get("ETag")) for key, info in found.items() if not key.endswith("/")}


def fetch(uri: str, path: Path) -> None:
    """Write the content of a file on s3:// to a local path. Raises `FileNotFoundError`."""
    _call(uri, "get_file", uri, str(path))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local file with the content of ``uri`` for the length of a ``with`` block (a video that is read once).

    The whole object, in one request where it has less than 50 MB: a clip's index, keyframes and 16 frames lie spread
    over most of a short file, and every range would be a round trip of its own.
    """
    if not is_remote(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        path = Path(scratch) / (uri.rstrip("/").rsplit("/", 1)[-1] or "object")
        fetch(uri, path)
        yield path


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
        raise InputError(f"{uri}: cannot write there ({_brief(error)}); choose another --output") from None


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """``(filesystem, path)`` for libraries that write through pyarrow; ``(None, path)`` for local ones."""
    if not is_remote(uri):
        return None, absolute(uri)
    import pyarrow.fs

    _remote(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return pyarrow.fs.S3FileSystem(endpoint_override=endpoint), uri.removeprefix("s3://")


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
