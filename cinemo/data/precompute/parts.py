"""The parts of a dataset that grew: what each append added, and which rows of a manifest are new.

``dataset.json`` describes the first part as its ``plan``, and each later one in ``appended``, or in ``appending`` while
its shards are still being made. Which rows of its manifest a later part took is kept in ``parts/part-000001.parquet``,
so that a stopped append goes on with the same ones; and of a recipe with several shapes, which one each clip has, also
of the first part (``part-000000``): files that changed since do not change the plan.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cinemo import storage
from cinemo.data.dataset import columns
from cinemo.data.manifest.checks import hash_texts, refuse
from cinemo.data.manifest.manifest import Manifest
from cinemo.data.precompute.plan import Plan
from cinemo.types import InputError

APPEND = ("skip", "refuse")
DIRECTORY = "parts"
_BATCH_ROWS = 1 << 16
_READERS = 16
_SHOWN = 8  # faults that are looked for
_LONGEST = 80  # characters of a value in a message


@dataclass(frozen=True)
class Part:
    """Clips that came at once: their positions and shards, and the manifest (digest and number of rows) of theirs."""

    clips: int
    shards: int
    manifest: str
    manifest_rows: int
    first_clip: int = 0
    first_shard: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Self:
        rows = len(plan.clips)
        return cls(len(plan), plan.shards, plan.clips.digest, rows, plan.first_clip, plan.first_shard)

    @property
    def numbers(self) -> range:
        """The shards that were planned for it."""
        return range(self.first_shard, self.first_shard + self.shards)

    @property
    def is_everything(self) -> bool:
        """Whether its manifest lists all clips that the dataset had with it; none is in a manifest twice."""
        return self.manifest_rows == self.first_clip + self.clips

    def lists_same_as(self, other: Part) -> bool:
        """Whether both come from the same manifest, whatever they took of it."""
        return (self.manifest, self.manifest_rows) == (other.manifest, other.manifest_rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stored_parts(info: Mapping[str, Any]) -> list[Part]:
    """The parts that a ``dataset.json`` names, one that is not finished included."""
    plan = info["plan"]
    first = Part(plan["clips"], plan["shards"], plan["manifest"], plan["clips"])
    later = [*info.get("appended", ()), *([info["appending"]] if "appending" in info else [])]
    return [first, *(Part(**part) for part in later)]


def rows_uri(dataset: str, part: int) -> str:
    return storage.join(dataset, DIRECTORY, f"part-{part:06d}.parquet")


def write_rows(dataset: str, part: int, plan: Plan) -> None:
    """Store the rows that a plan took of its manifest, and which shape each clip has where there are several."""
    sink = io.BytesIO()
    rows = np.arange(len(plan)) if plan.chosen is None else plan.chosen
    table = pa.table({"row": pa.array(rows, pa.int64())})
    encodings: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"row": "DELTA_BINARY_PACKED"}}
    if plan.kinds is not None:
        table = table.append_column("shape", pa.array(plan.kinds, pa.uint8()))
        encodings["column_encoding"]["shape"] = "PLAIN"
    pq.write_table(table, sink, compression="zstd", write_statistics=False, **encodings)
    storage.write_bytes(rows_uri(dataset, part), sink.getvalue())


def read_rows(dataset: str, part: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The inverse of `write_rows`: rows and numbers of shapes.

    Raises:
        InputError: the file is gone.
    """
    place = rows_uri(dataset, part)
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(place)))
    except FileNotFoundError:
        raise InputError(
            f"{place}: is missing, and nothing else says which clips are planned for which shard"
        ) from None
    kinds = np.asarray(table["shape"], np.uint8) if "shape" in table.column_names else None
    return np.asarray(table["row"], np.int64), kinds


def new_rows(
    dataset: str,
    shards: Mapping[int, str],
    parts: Sequence[Part],
    manifest: Manifest,
    prefix: Callable[[int], str] | None,
    known: str,
) -> np.ndarray:
    """The rows of a manifest whose clips the dataset does not have, ascending.

    A manifest that only got longer is recognised by the digest of its beginning. Otherwise the clip ids of all shards
    are read, 28 bytes of memory a clip; of ids whose hashes agree, the ids themselves are compared.

    Args:
        shards: checksum of every committed shard, by number.
        prefix: digest of the first rows of the manifest, by their number.
        known: what to do about clips that are there already: ``skip`` or ``refuse``.

    Raises:
        InputError: a row names a clip that is there, with another uri, caption or range of time; or any that is there.
    """
    last = parts[-1]
    longer = last.is_everything and last.manifest_rows < len(manifest)
    if known == "skip" and longer and prefix is not None and prefix(last.manifest_rows) == last.manifest:
        return np.arange(last.manifest_rows, len(manifest))
    there, rows, faults, count = _Clips(dataset, shards), [], list[str](), 0
    for start in range(0, len(manifest), _BATCH_ROWS):
        batch = manifest.clips(start, start + _BATCH_ROWS)
        fresh = there.look_up(batch, start, known == "refuse", faults)
        count += len(batch) - int(fresh.sum())
        rows.append(start + np.flatnonzero(fresh))
    if faults:
        refuse("given to --append", faults, count if known == "refuse" else None)
    return np.concatenate(rows)


class _Clips:
    """The clips of a dataset by hashes of their ids. A hash of 0 stands for what an older dataset does not tell."""

    def __init__(self, dataset: str, shards: Mapping[int, str]) -> None:
        self._dataset, self._checksums = dataset, shards
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._hashes, shards))
        ids, contents, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((contents[:, 1], contents[:, 0], ids))
        self._ids, self._contents, self._shards = ids[order], contents[order], numbers[order]

    def look_up(self, batch: pa.Table, first_row: int, refuse_known: bool, faults: list[str]) -> np.ndarray:
        """Which rows of a batch are new (bool). Notes the first faults of the others."""
        ids, contents = hash_texts(_chunk(batch, "clip_id")), _contents(batch)
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        fresh = np.asarray(self._ids[places] != ids)
        same = ~fresh & _agree(self._contents[places], contents).all(1)
        for row in np.flatnonzero(~fresh & (~same | refuse_known)).tolist():
            if len(faults) >= _SHOWN:
                break
            values = batch.slice(row, 1).to_pylist()[0]
            stored = values if same[row] else self._stored(values["clip_id"], ids[row])
            if stored is None:  # another clip whose id has the same hash
                fresh[row] = True
                continue
            changed = [
                f"{name} {_short(stored[name])} there and {_short(values[name])} here"
                for name in ("uri", "caption", "start", "end")
                if name in stored and stored[name] != values[name]
            ]
            if changed or refuse_known:
                what = f"with {', '.join(changed)}" if changed else "(--append skip leaves such rows out)"
                faults.append(f"row {first_row + row + 1}: clip_id {values['clip_id']!r} is in the dataset {what}")
        return fresh

    def _hashes(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = columns.read(self._dataset, number, self._checksums[number]).clips
        ids = hash_texts(_chunk(table, "clip_id"))
        return ids, _contents(table), np.full(len(ids), number, np.int32)

    def _stored(self, clip_id: str, id_hash: np.uint64) -> dict[str, Any] | None:
        """What is stored of a clip; None where there is none of this id."""
        start, stop = (np.searchsorted(self._ids, id_hash, side=side) for side in ("left", "right"))
        for number in np.unique(self._shards[start:stop]).tolist():
            table = columns.read(self._dataset, number, self._checksums[number]).clips
            rows = table.filter(pc.equal(table["clip_id"], clip_id)).to_pylist()
            if rows:
                return dict(rows[0])
        return None


def _agree(there: np.ndarray, here: np.ndarray) -> np.ndarray:
    return np.asarray((there == here) | (there == 0))


def _contents(table: pa.Table) -> np.ndarray:
    """Hashes of uri with caption, and of the range of time (N, 2); 0 where the table does not tell."""
    made = np.zeros((len(table), 2), np.uint64)
    if "caption" in table.column_names:
        texts = pc.binary_join_element_wise(_chunk(table, "uri"), pc.fill_null(_chunk(table, "caption"), ""), "\0")
        known = np.asarray(pc.is_valid(_chunk(table, "caption")))
        made[:, 0] = np.where(known, hash_texts(texts) | np.uint64(1), 0)
    if "start" in table.column_names:
        bounds = [_chunk(table, name).cast(pa.float64()) for name in ("start", "end")]
        start, end = (np.ascontiguousarray(pc.fill_null(bound, -1.0), np.float64) for bound in bounds)
        seconds = pc.binary_join_element_wise(*(pa.array(v.view(np.int64)).cast(pa.string()) for v in (start, end)), "")
        made[:, 1] = hash_texts(seconds) | np.uint64(1)
    return made


def _chunk(table: pa.Table, name: str) -> pa.Array:
    return pa.concat_arrays([pa.array([], table[name].type), *table[name].chunks])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
