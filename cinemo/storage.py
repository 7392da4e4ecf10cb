"""Files on a local disk or on s3://, with one set of functions: atomic writes, ranges, retry, a local cache.

Credentials and endpoint come from the environment as for every AWS tool (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ...).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cinemo.types import InputError


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

    # botocore's own retry (standard mode backs off with jitter) covers throttling, 5xx and dropped connections.
    return s3fs.S3FileSystem(
        config_kwargs={"retries": {"max_attempts": 8, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 60},
        use_listings_cache=False,
        default_cache_type="none",
    )


def _remote(uri: str) -> Any:
    scheme = uri.partition("://")[0]
    if scheme != "s3":
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; expected a local path or s3://bucket/key")
    return _s3()


def exists(uri: str) -> bool:
    return bool(_remote(uri).exists(uri)) if is_remote(uri) else local_path(uri).exists()


def size(uri: str) -> int:
    return int(_remote(uri).info(uri)["size"]) if is_remote(uri) else local_path(uri).stat().st_size


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``start``. Raises `FileNotFoundError`."""
    if is_remote(uri):
        end = None if length is None else start + length
        return bytes(_remote(uri).cat_file(uri, start=start or None, end=end))
    with local_path(uri).open("rb") as file:
        file.seek(start)
        return file.read(-1 if length is None else length)


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a whole file atomically: a reader sees the old content, or all of the new one.

    Local: a temporary file in the same directory, flushed to disk and renamed. S3: one PUT (or one multipart upload).
    """
    if is_remote(uri):
        _remote(uri).pipe_file(uri, bytes(data))
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Atomic, with sorted keys, so that equal values are equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def names(uri: str) -> list[str]:
    """Sorted names directly under a directory; empty where there is none."""
    if is_remote(uri):
        try:
            found = _remote(uri).ls(uri, detail=False)
        except FileNotFoundError:
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in found})
    path = local_path(uri)
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def remove(uri: str) -> None:
    """Remove a file or a whole directory; one that is not there is no error."""
    if is_remote(uri):
        if _remote(uri).exists(uri):
            _remote(uri).rm(uri, recursive=True)
        return
    path = local_path(uri)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def upload(directory: Path, uri: str) -> None:
    """Copy a local directory's content to ``uri`` (existing files of the same name are replaced)."""
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        target = join(uri, *path.relative_to(directory).parts)
        if is_remote(uri):
            _remote(uri).put_file(str(path), target)
        else:
            write_bytes(target, path.read_bytes())


def cache_directory() -> Path:
    """Where fetched files are kept: ``$CINEMO_CACHE``, or ``~/.cache/cinemo``."""
    return Path(os.environ.get("CINEMO_CACHE") or Path.home() / ".cache" / "cinemo")


def localize(uri: str) -> Path:
    """A local path with the content of ``uri`` (a file or a directory); s3:// is fetched once and kept.

    The cache key holds sizes and ETags, so that an object that was replaced is fetched again.
    Raises `InputError` where nothing is there.
    """
    if not is_remote(uri):
        path = local_path(uri)
        if not path.exists():
            raise InputError(f"{uri}: no such file or directory")
        return path
    filesystem = _remote(uri)
    root = uri.removeprefix("s3://").rstrip("/")
    listing = {k: v for k, v in filesystem.find(uri, detail=True).items() if not k.endswith("/")}
    if not listing:
        raise InputError(f"{uri}: nothing there (bucket, key or credentials wrong?)")
    stamp = json.dumps([(key, info["size"], info.get("ETag")) for key, info in sorted(listing.items())])
    target = cache_directory() / hashlib.sha256((uri + stamp).encode()).hexdigest()[:32] / root.rsplit("/", 1)[-1]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / target.name
        for key in listing:
            path = staged / key.removeprefix(root).lstrip("/") if key != root else staged
            path.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(key, str(path))
        try:
            os.replace(staged, target)
        except OSError:
            if not target.exists():  # another process may have fetched it meanwhile, which is as good
                raise
    return target


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local file with the content of ``uri`` for the length of a ``with`` block (a video that is read once)."""
    if not is_remote(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        path = Path(scratch) / (uri.rstrip("/").rsplit("/", 1)[-1] or "object")
        _remote(uri).get_file(uri, str(path))
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
    except InputError:
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
