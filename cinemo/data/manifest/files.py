"""Which files a manifest's uri names: one, those of a glob or of braces, or what lies in a directory."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cinemo import cache, storage
from cinemo.data.manifest.folders import is_video
from cinemo.data.manifest.formats import COMPRESSED, TEXTS
from cinemo.types import InputError

EXPECTED = (
    "expected a .parquet, .csv or .jsonl file (or .tsv, .ndjson, .json; text also as .gz, .zst or .bz2), a .tar, "
    "a glob of such files, or a directory of them or of videos"
)
_READERS = 16


@dataclass(frozen=True)
class File:
    """A file on storage.

    ``name`` is its path from where all files of the manifest lie, without its ending; ``parent`` is what relative uris
    in it count from; ``stamp`` changes with its content.
    """

    uri: str
    name: str
    kind: str
    parent: str
    size: int
    stamp: Any

    def local(self) -> Path:
        """A local path; a remote file is fetched once and kept."""
        return cache.localize(self.uri).resolve()


@dataclass(frozen=True)
class Found:
    """``kind`` is that of all ``files``: ``parquet``, ``csv``, ``json``, ``tar`` or ``videos``, a folder of them.

    ``names`` are paths under ``root``, with sizes and stamps; of videos and what lies beside them.
    """

    kind: str
    root: str
    files: tuple[File, ...]
    names: tuple[tuple[str, int, Any], ...] = ()


def find(uri: str) -> Found:
    """What a manifest's uri names.

    Raises:
        InputError: nothing is there, or of no kind or of several.
    """
    if not storage.is_remote(uri):
        uri = storage.absolute(uri)
    braces = _braces(uri)
    if braces:
        with ThreadPoolExecutor(_READERS) as pool:
            stamps = pool.map(_looked_up, braces)
            matches = [(name, *stamp) for name, stamp in zip(braces, stamps, strict=True)]
        return _files(uri, _directory_of(uri[: uri.index("{")]), matches)
    if not storage.is_remote(uri):
        path = storage.local_path(uri)
        if path.is_dir():
            return _directory(uri, _local_entries(path))
        if not path.exists() and glob.has_magic(uri):
            local = sorted(name for name in glob.glob(uri, recursive=True) if Path(name).is_file())
            root = _directory_of(uri[: re.search(r"[*?[]", uri).start()])  # type: ignore[union-attr]
            return _files(uri, root, [(name, *_looked_up(name)) for name in local])
        return _one(uri, _looked_up(uri))
    if "*" in uri:
        root = _directory_of(uri[: uri.index("*")])
        return _files(uri, root, _remote_glob(uri, root))
    root, listing = uri.rstrip("/"), _remote_listing(uri)
    if root in listing:
        return _one(root, listing[root])
    if not listing:
        raise InputError(f"{uri}: nothing there (bucket, key or credentials wrong?)")
    return _directory(root, [(name.removeprefix(f"{root}/"), *value) for name, value in sorted(listing.items())])


def kind_of(name: str) -> str | None:
    """What a file is by its name, or None."""
    endings = name.rsplit("/", 1)[-1].lower().split(".")[1:]
    if endings and endings[-1] in COMPRESSED:
        return TEXTS.get(endings[-2]) if len(endings) > 1 else None
    ending = endings[-1] if endings else ""
    return ending if ending in ("parquet", "tar") else TEXTS.get(ending)


def _one(uri: str, stamp: tuple[int, Any]) -> Found:
    if kind_of(uri) is None:
        raise InputError(f"manifest {uri}: {EXPECTED}")
    return _files(uri, _directory_of(uri), [(uri, *stamp)])


def _files(uri: str, root: str, matches: Sequence[tuple[str, int, Any]]) -> Found:
    """Files of one kind under a directory ``root`` as a manifest."""
    if not matches:
        raise InputError(f"manifest {uri}: nothing there matches (a mistake in the pattern, bucket or credentials?)")
    kinds = {kind_of(name) for name, _, _ in matches}
    if len(kinds) > 1 or None in kinds:
        names = ", ".join(sorted(name.rsplit("/", 1)[-1] for name, _, _ in matches)[:4])
        raise InputError(f"manifest {uri}: files of several kinds ({names}, ...); {EXPECTED}")
    kind = str(kinds.pop())
    return Found(
        kind,
        root,
        tuple(
            File(name, _stem(name.removeprefix(f"{root}/")), kind, _parent(name), size, stamp)
            for name, size, stamp in matches
        ),
    )


def _parent(uri: str) -> str:
    """A file's directory; of a part of a table that Spark, Ray or dask wrote as a directory, that of the table."""
    parts = uri.split("/")
    table = next((k for k, part in enumerate(parts[:-1]) if kind_of(part) == kind_of(uri)), len(parts) - 1)
    return "/".join(parts[:table]) or "/"


def _stem(path: str) -> str:
    directory, slash, name = path.rpartition("/")
    return directory + slash + name.split(".")[0]


def _directory_of(uri: str) -> str:
    return uri.rsplit("/", 1)[0] or "/"


def _directory(root: str, entries: Sequence[tuple[str, int, Any]]) -> Found:
    """A directory: of videos, else of tars, else of the parts of a table."""
    visible = [entry for entry in entries if not entry[0].rsplit("/", 1)[-1].startswith(".")]
    if any(is_video(name) for name, _, _ in visible):
        return Found("videos", root, (), tuple(visible))
    for kinds in (("tar",), ("parquet",), ("csv", "json")):
        parts = [
            entry
            for entry in visible
            if kind_of(entry[0]) in kinds and not any(part[0] in "._" for part in entry[0].split("/"))
        ]
        if parts:
            return _files(root, root, [(storage.join(root, name), size, stamp) for name, size, stamp in parts])
    raise InputError(
        f"{root}: no videos there (looked for .mp4, .webm, .mov and other kinds), and no .tar, .parquet, .csv or .jsonl"
    )


def _local_entries(root: Path) -> list[tuple[str, int, Any]]:
    entries = sorted(path for path in root.rglob("*") if path.is_file())
    return [(path.relative_to(root).as_posix(), *_looked_up(str(path))) for path in entries]


def _looked_up(uri: str) -> tuple[int, Any]:
    """Size and stamp of a file."""
    if storage.is_remote(uri):
        found = _remote_listing(uri).get(uri)
        if found is None:
            raise InputError(f"{uri}: nothing there (bucket, key or credentials wrong?)")
        return found
    path = storage.local_path(uri)
    if not path.exists():
        raise InputError(f"{uri}: no such file or directory")
    stat = path.stat()
    # The time of the last change cannot be set back.
    return stat.st_size, [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _remote_glob(uri: str, directory: str) -> list[tuple[str, int, Any]]:
    pattern = re.escape(uri).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return [(name, *value) for name, value in sorted(_remote_listing(directory).items()) if re.fullmatch(pattern, name)]


def _remote_listing(uri: str) -> dict[str, tuple[int, Any]]:
    scheme = uri.partition("://")[0]
    return {f"{scheme}://{key}": value for key, value in storage.listing(uri).items()}


def _braces(uri: str) -> list[str]:
    """What WebDataset's ``{00000..00127}`` stands for; nothing where there are none."""
    if not re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", uri):
        return []
    from braceexpand import braceexpand

    return list(braceexpand(uri))
