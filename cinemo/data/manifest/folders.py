"""Folders of videos, local or on s3://, as people keep them: with captions in files beside the videos.

A caption is looked for, in this order, in ``a.txt`` beside ``a.mp4``; in the ``a.json`` there (video2dataset); in the
folder's ``metadata.jsonl`` or ``metadata.csv`` under the video's ``file_name`` (Hugging Face); in the line of
``prompts.txt`` that belongs to the video's line of ``videos.txt`` (trainers of video models). Where there is none, it
is the words of the file's name, and counted.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from cinemo import storage
from cinemo.data.manifest.captions import caption_of
from cinemo.data.manifest.json_lines import JSON_COLUMN
from cinemo.media.video import EXTENSIONS
from cinemo.types import InputError

NAMED = b"cinemo.captions-from-names"  # metadata of a table: how many, of how many, and the first of them
_READERS = 32
_VIDEO_LISTS, _PROMPT_LISTS = ("videos.txt", "video.txt"), ("prompts.txt", "prompt.txt")
_METADATA = ("metadata.jsonl", "metadata.csv")


def is_video(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in EXTENSIONS and "." in name


def words(name: str) -> str:
    """The words of a file's name without its ending."""
    return " ".join(re.sub(r"[\W_]+", " ", name.rsplit("/", 1)[-1].rsplit(".", 1)[0]).split())


def named(captions: Sequence[bool], names: Sequence[str]) -> dict[bytes, bytes]:
    """Metadata of a table of which some captions are the names of files."""
    from_names = [name for name, is_name in zip(names, captions, strict=True) if is_name]
    return {NAMED: json.dumps([len(from_names), len(names), from_names[:3]]).encode()}


def table_of_folder(root: str, names: Sequence[str], seed: int = 0, limit: int | None = None) -> pa.Table:
    """A manifest of all videos of a folder, sorted by path.

    The clip id is made of the relative path. Other values in a video's .json or metadata travel with the clip. Broken
    videos stay in: they end in the quarantine ledger.

    Args:
        names: paths of all files in the folder, relative to it.
        limit: how many clips at most.
    """
    there = set(names)
    for name in names:
        check_name(name, root)
    videos = sorted((name for name in names if is_video(name)), key=lambda name: name.split("/"))[:limit]
    texts = {name: _beside(name, "txt") for name in videos if _beside(name, "txt") in there}
    sidecars = {name: _beside(name, "json") for name in videos if name not in texts and _beside(name, "json") in there}
    with ThreadPoolExecutor(_READERS if storage.is_remote(root) else 1) as pool:
        read = pool.map(
            lambda name: storage.read_bytes(storage.join(root, name)), [*texts.values(), *sidecars.values()]
        )
        contents = dict(zip([*texts, *sidecars], read, strict=True))
    lists = {} if len(texts) == len(videos) else _listed(root, there)
    unknown = sorted(lists.keys() - there)
    videos = (videos + unknown)[:limit]  # a clip that is missing is refused by itself, and counted
    rows, from_names = [], []
    for name, clip_id in zip(videos, _clip_ids(videos), strict=True):
        values: dict[str, Any] = {}
        if name in texts:
            values["caption"] = " ".join(contents[name].decode("utf-8", errors="replace").split())
        else:
            if name in sidecars:
                values = read_object(contents[name], storage.join(root, sidecars[name]))
            values = lists.get(name, {}) | values
        caption, others = caption_of(values, clip_id, seed)
        from_names.append(caption is None)
        window = {key: others.pop(key, None) if name in lists else None for key in ("start", "end")}
        rows.append(
            {
                "clip_id": clip_id,
                "uri": storage.join(root, name),
                "caption": words(name) if caption is None else caption,
                **{key: None if value is None else str(value) for key, value in window.items()},
                JSON_COLUMN: json.dumps(others, sort_keys=True, ensure_ascii=False) if others else None,
            }
        )
    schema = pa.schema([(name, pa.string()) for name in ("clip_id", "uri", "caption", "start", "end", JSON_COLUMN)])
    table = pa.Table.from_pylist(rows, schema)
    if table[JSON_COLUMN].null_count == len(table):
        table = table.drop_columns([JSON_COLUMN])
    return table.replace_schema_metadata(named(from_names, videos))


def check_name(name: str, uri: str) -> None:
    """Raise `InputError` where a file's name cannot be part of a uri."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"manifest {uri}: the name {name!a} is not UTF-8; rename it") from None


def read_object(content: bytes, uri: str) -> dict[str, Any]:
    """A JSON object out of a file beside a video."""
    try:
        values = json.loads(content)
        json.dumps(values, ensure_ascii=False).encode()  # JSON can escape half a character, which no file can hold
    except UnicodeEncodeError:
        raise InputError(f"{uri}: has half a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{uri}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{uri}: a JSON {type(values).__name__}, expected an object with a caption")
    return values


def _beside(video: str, ending: str) -> str:
    return f"{video.rsplit('.', 1)[0]}.{ending}"


def _clip_ids(videos: Iterable[str]) -> Iterable[str]:
    taken = set()
    for name in videos:
        clip_id = re.sub(r"[^\w-]+", "-", name.rsplit(".", 1)[0]).strip("-") or "clip"
        if clip_id in taken:
            clip_id = re.sub(r"[^\w-]+", "-", name).strip("-")
        while clip_id in taken:
            clip_id += "-again"
        taken.add(clip_id)
        yield clip_id


def _listed(root: str, there: set[str]) -> dict[str, dict[str, Any]]:
    """What lists in the folder, or in folders in it, say of videos."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(there):
        directory, _, name = path.rpartition("/")
        prefix = f"{directory}/" if directory else ""
        uri = storage.join(root, path)
        if name in _METADATA:
            rows = [(row.pop("file_name", None), row) for row in _records(uri)]
        elif name in _VIDEO_LISTS:
            prompts = [f"{prefix}{other}" for other in _PROMPT_LISTS if f"{prefix}{other}" in there]
            if not prompts:
                continue
            videos, captions = _lines(uri), _lines(storage.join(root, prompts[0]))
            if len(videos) != len(captions):
                raise InputError(
                    f"{uri}: {len(videos)} videos, but {len(captions)} captions in {prompts[0]}; expected one line each"
                )
            rows = [(video.strip(), {"caption": caption}) for video, caption in zip(videos, captions, strict=True)]
        else:
            continue
        for number, (video, values) in enumerate(rows, 1):
            if not isinstance(video, str) or not video:
                raise InputError(f"{uri}: row {number}: file_name is {video!r}, expected the path of a video")
            video = prefix + video.removeprefix("./")
            if video in found:
                raise InputError(
                    f"{uri}: row {number}: {video} is listed twice; give the list itself as --manifest, with --columns"
                )
            found[video] = values
    return found


def _lines(uri: str) -> list[str]:
    text = storage.read_bytes(uri).decode("utf-8-sig").rstrip("\r\n")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _records(uri: str) -> list[dict[str, Any]]:
    text = storage.read_bytes(uri).decode("utf-8-sig")
    if uri.endswith(".csv"):
        return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    rows = []
    for number, line in enumerate((line for line in text.split("\n") if line.strip()), 1):
        rows.append(read_object(line.encode(), f"{uri}: row {number}"))
    return rows
