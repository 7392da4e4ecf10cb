"""The source of a clip: what its uri may name, and a local file with the content.

A uri is a local path (or file://) or names an object of s3://, gs:// or az://, or a file behind https://. It may also
name a member of a container at such a place (`cinemo.media.members`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cinemo import clouds, s3, storage, web
from cinemo.media.members import member
from cinemo.media.parquet import read_row
from cinemo.types import SET_TMPDIR, ClipError, InputError, RunError, local_faults

# Reasons for which a source cannot be had now; it may be as good as ever.
NOT_THERE = frozenset({"missing", "denied", "unreachable"})

_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")
_WEB = ("https://", "http://")
_KEPT_FILES, _KEPT_BYTES = 4, 1 << 30
_PIECE_BYTES = 32 << 20  # of a range that is read at a time


def refused_scheme(scheme: str) -> str | None:
    """Why no clip can be read by URLs that begin with ``scheme://``; None where one can."""
    if scheme in ("file", "s3", "https") or (scheme == "http" and web.setting(web.PLAIN)):
        return None
    if scheme in clouds.PACKAGES:
        return None if clouds.is_installed(scheme) else f"needs `pip install {clouds.PACKAGES[scheme]}`"
    if scheme == "http":
        return f"expected https:// ({web.PLAIN}=1 allows http)"
    if scheme != scheme.lower() and refused_scheme(scheme.lower()) is None:
        return f"expected {scheme.lower()}://"
    return "expected a local path, s3://, https://, gs:// or az://"


class Sources:
    """Local files for clips, as long as a ``with`` block lasts; clips of one uri, one after another, share a copy.

    A few copies are kept, for clips that take turns: never more than four, nor more than 1 GiB beside the last one.
    """

    def __init__(self) -> None:
        self._copies: OrderedDict[str, Path] = OrderedDict()
        self._versions: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._directory: Path | None = None
        self._count = 0

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *fault: object) -> None:
        self._stack.close()
        self._copies.clear()
        self._versions.clear()
        self._directory = None

    @contextmanager
    def file(self, uri: str) -> Iterator[Path]:
        """A local file with a clip's content. A `ClipError` that is raised inside names the uri instead of a copy.

        Raises:
            ClipError: of stage ``open``: nothing is there, or it may not be read, or `cinemo.web.fetch` refused it.
            InputError, RunError: what is no clip's fault: no credentials, a storage that fails, a full disk.
        """
        if uri in self._copies:
            self._copies.move_to_end(uri)
        path = self._copies.get(uri) or self._local(uri)
        try:
            yield path
        except ClipError as error:
            raise naming_source(error, path, uri) from error

    def _local(self, uri: str) -> Path:
        inside = member(uri)
        container = inside.container if inside else uri
        with _clip_faults(uri):
            if inside is None and not storage.is_remote(uri):
                path = storage.local_path(uri)
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # who opens it says so
                    path.stat()
                return path
            self._make_room()
            path = self._new_path(inside.name if inside else uri)
            if inside and inside.column:
                if container.startswith(_WEB):
                    raise ClipError("open", "invalid_uri", f"{uri}: rows of Parquet need a disk or s3://")
                version = self._versions.get(container) or self._versions.setdefault(
                    container, storage.version(container)
                )
                content = read_row(uri, container, version, inside.column, inside.row)
                with local_faults(path, SET_TMPDIR):
                    path.write_bytes(content)
            elif container.startswith(_WEB):
                web.fetch(container, path, inside.span if inside else None)
            elif inside and inside.span:
                _copy_range(uri, container, inside.span, path)
            else:
                storage.fetch(uri, path)
        self._copies[uri] = path
        return path

    def _new_path(self, name: str) -> Path:
        """Names are our own but for a file's suffix, with which FFmpeg's guess of a format is better."""
        if self._directory is None:
            with local_faults(tempfile.gettempdir(), SET_TMPDIR):
                self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cinemo-")))
        suffix = os.path.splitext(name)[1]
        self._count += 1
        return self._directory / f"{self._count}{suffix if _SUFFIX.fullmatch(suffix) else ''}"

    def _make_room(self) -> None:
        """For one more copy."""
        sizes = {uri: path.stat().st_size for uri, path in self._copies.items()}
        while len(sizes) >= _KEPT_FILES or sum(sizes.values()) > _KEPT_BYTES:
            uri, path = self._copies.popitem(last=False)
            del sizes[uri]
            path.unlink()


def naming_source(error: ClipError, path: Path, uri: str) -> ClipError:
    """An error about a local copy as one about its source: equal runs write equal ledgers."""
    return ClipError(error.stage, error.reason, error.detail.replace(str(path), uri))


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """`Sources.file` of a single clip."""
    with Sources() as sources, sources.file(uri) as path:
        yield path


def _copy_range(uri: str, container: str, span: tuple[int, int], path: Path) -> None:
    offset, left = span
    with local_faults(path, SET_TMPDIR):
        file = path.open("wb")
    with file:
        while left:
            piece = storage.read_bytes(container, offset, min(left, _PIECE_BYTES))
            if not piece:
                raise ClipError("open", "truncated", f"{uri}: the container ends {left} bytes before that")
            with local_faults(path, SET_TMPDIR):
                file.write(piece)
                file.flush()
            offset, left = offset + len(piece), left - len(piece)


@contextmanager
def _clip_faults(uri: str) -> Iterator[None]:
    """What is wrong with one source, as a `ClipError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ClipError("open", "missing", f"{uri}: no such file") from None
    except PermissionError as error:
        raise ClipError("open", "denied", str(error) if uri in str(error) else f"{uri}: {error}") from None
    except s3.BadName as error:
        raise ClipError("open", "invalid_uri", str(error)) from None
    except s3.PastEnd:
        raise ClipError("open", "truncated", f"{uri}: the container ends before that") from None
    except (InputError, RunError):
        raise
    except (OSError, ValueError) as error:  # a name that no file can have, a directory, a disk that fails
        raise ClipError("open", "unreadable", f"{uri}: {getattr(error, 'strerror', None) or error}") from None
