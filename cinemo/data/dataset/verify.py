"""Is a dataset still what it says it is? Every file against its record, and a sample of it made once more (the canary).

Nothing is changed. Ray-free: threads read, and hashing leaves Python's lock alone.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cinemo import checksums, lock, storage
from cinemo.config import Recipe
from cinemo.data.dataset import columns, shards, sidecars
from cinemo.data.dataset.fields import decode_again, identity
from cinemo.data.dataset.identity import as_begun, differences, encoder_dtype, fingerprint
from cinemo.data.dataset.shards import DatasetIndex, Members, shard_name
from cinemo.data.precompute import stages
from cinemo.data.precompute.shapes import KEPT
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.sources import NOT_THERE
from cinemo.progress import counted, doing
from cinemo.types import ClipError, InputError, LatentSample, RunError, keyed_seed

CANARY_SAMPLES = 8
# How far a sample made on another kind of machine may be off. Latents: root mean square of the difference over that of
# the sample; half precision is off by about 0.001, other weights by about 1.
LATENT_TOLERANCE, SSIM_TOLERANCE = 0.01, 1e-4
# What may lie beside a dataset's two indexes: what a plan and a run report.
ROOT_FILES = frozenset({"dataset.json", "index.parquet", "plan.json", "report.html", "report.json"})
_RECORD = {
    "shard",
    "fingerprint",
    "samples",
    "quarantined",
    "reasons",
    "retry_of",
    "bytes",
    "ssim",
    "members",
}
_SIDECAR = {"shard", "fingerprint", "samples", "missing", "bytes", "members"}
_THREADS = 4  # each holds one shard in memory
_SHOWN = 3


@dataclass
class Canary:
    """Samples that were made once more: how many came out equal bit for bit, and how far off the worst latents were.

    ``skipped``: samples whose source is gone; they say nothing. ``faults``: one line for each that is off too far, and
    ``unreadable`` for each that cannot be read from its shard.
    """

    samples: int
    equal: int = 0
    skipped: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class _Checked:
    """What is left in memory of a shard once it was read."""

    shard: int
    faults: list[str] = field(default_factory=list)
    bytes: int = 0
    record: dict[str, Any] | None = None
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # hashed
    refused: Counter[str] = field(default_factory=Counter)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)  # records of sidecars, by field


def verify(uri: str, recipe: Recipe, samples: int = CANARY_SAMPLES) -> dict[str, Any]:
    """Check every byte under ``uri`` against its record, all records against each other, and make some samples again.

    Returns:
        What was checked: ``shards``, ``sidecars``, ``samples``, ``bytes``, ``seconds``, ``fields``, ``canary``.

    Raises:
        InputError: there is no finished dataset, or ``samples`` is negative.
        RunError: something is not as it should be; its line names the first faults.
    """
    if samples < 0:
        raise InputError(f"--sample is {samples}, expected 0 or more")
    index = DatasetIndex.load(storage.absolute(uri))
    if "appending" in index.info:
        raise InputError(f"{uri}: an append is not finished; run the command that began it again, then verify")
    fields = _fields(index)
    started = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        checking = pool.map(lambda number: _check(index, number, fields), index.shards)
        checked = list(counted("checking", checking, len(index.shards), "shards"))
    with doing("comparing records"):
        faults = [
            *_strays(index, fields),
            *(fault for shard in checked for fault in shard.faults),
            *_disagreements(index, checked, fields),
            *_repeated_keys(index, checked),
            *_other_recipe(index, recipe, fields),
        ]
    seconds = time.perf_counter() - started
    with doing("making samples again"):
        made_again = canary(index, recipe, samples, recipe.data.seed) if samples else Canary(0)
    faults += [*made_again.faults, *made_again.unreadable]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        count = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        raise RunError(f"{uri}: {count}: {'; '.join(faults[:_SHOWN])}{more}")
    return {
        "shards": len(checked),
        "sidecars": sum(len(shard.beside) for shard in checked),
        "samples": int(index.samples_of_shards.sum()),
        "bytes": sum(shard.bytes for shard in checked),
        "seconds": seconds,
        "fields": sorted(fields),
        "canary": asdict(made_again),
    }


def sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """What `verify` found, for a person."""
    megabytes, fields, again = result["bytes"] / 1e6, result["fields"], result["canary"]
    beside = f" and {result['sidecars']} sidecars ({', '.join(fields)})" if fields else ""
    yield f"{result['samples']} samples in {result['shards']} shards{beside}, {megabytes:.1f} MB"
    yield (
        f"every checksum, size, member, record and total agrees, no key appears twice, no stray files "
        f"({megabytes / result['seconds']:.0f} MB/s)"
    )
    if again["samples"]:
        yield (
            f"{again['samples']} samples made again: {again['equal']} equal bit for bit, "
            f"{again['skipped']} without a source, latents off by at most {again['worst']:.2g} of their size"
        )


def canary(index: DatasetIndex, recipe: Recipe, samples: int, seed: int) -> Canary:
    """Make a seeded choice of stored samples once more from their source and compare, latents and motion score.

    On the kind of machine that made them they are equal bit for bit; elsewhere, or with other versions of libraries,
    they are off by less than `LATENT_TOLERANCE` and `SSIM_TOLERANCE`, which is no fault.

    Raises:
        InputError: the recipe's VAE cannot be loaded.
    """
    data, dtype = recipe.data, encoder_dtype(recipe)
    if data.encode_gpus and not torch.cuda.is_available():
        data, dtype = data.model_copy(update={"encode_gpus": 0.0}), "float32"
    encoder = stages.Encoder(data, recipe.encoders.vae, recipe.encoders.latent, dtype)
    ends = np.cumsum(index.samples_of_shards)
    generator = np.random.default_rng(keyed_seed(seed, "canary"))
    positions = np.sort(generator.choice(ends[-1], min(samples, int(ends[-1])), replace=False))
    result = Canary(len(positions))
    for position in positions.tolist():
        place = int(np.searchsorted(ends, position, side="right"))
        number = index.shards[place]
        try:
            members = Members(**storage.read_json(shards.record_uri(index.uri, number))["members"])
            sample = shards.fetch_sample(index.uri, number, members, position - int(ends[place]) + len(members.keys))
            own = data.of_shape(shards.pixels(sample.latents_FCHW.shape)) if data.other_shapes else data
            frames_FHWC = decode_again([asdict(sample)], own, own.frames)[0]
            latents_FCHW = encoder.encode(frames_FHWC, sample.clip_id, sample.view)
        except ClipError as error:
            if error.reason in NOT_THERE:
                result.skipped += 1
            else:
                result.faults.append(f"sample {sample.key}: its source has changed ({error})")
            continue
        except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
            result.unreadable.append(f"{_shard(number)}.tar: a sample of it cannot be read ({error})")
            continue
        _compare(result, sample, latents_FCHW, mean_adjacent_ssim(frames_FHWC, data.ssim))
    return result


def _compare(result: Canary, sample: LatentSample, latents_FCHW: np.ndarray, ssim: float) -> None:
    stored = sample.latents_FCHW.astype(np.float32)
    if stored.shape != latents_FCHW.shape:
        result.faults.append(
            f"sample {sample.key}: latents are {stored.shape}, but {latents_FCHW.shape} when made again"
        )
        return
    difference = latents_FCHW.astype(np.float32) - stored
    off = float(np.sqrt((difference**2).mean() / max((stored**2).mean(), 1e-12)))
    result.worst = max(result.worst, off)
    result.equal += bool(np.array_equal(latents_FCHW, sample.latents_FCHW) and ssim == sample.ssim)
    if off > LATENT_TOLERANCE:
        result.faults.append(
            f"sample {sample.key}: latents made again are off by {off:.2g} of their size, expected at most "
            f"{LATENT_TOLERANCE:g}: another VAE, decoder or source"
        )
    elif abs(ssim - sample.ssim) > SSIM_TOLERANCE:
        result.faults.append(f"sample {sample.key}: ssim is {sample.ssim!r}, but {ssim!r} when made again")


def _shard(number: int) -> str:
    return f"shards/{shard_name(number)}"


def _fields(index: DatasetIndex) -> dict[str, dict[str, Any]]:
    """``fields/FIELD.json`` of every field that there is."""
    names = storage.names(storage.join(index.uri, "fields"))
    return {
        name: storage.read_json(sidecars.info_uri(index.uri, name))
        for name in sidecars.EXTENSIONS
        if f"{name}.json" in names
    }


def _check(index: DatasetIndex, number: int, fields: Mapping[str, Any]) -> _Checked:
    checked = _Checked(number)
    try:
        _check_shard(checked, index, number, fields)
    except (ValueError, LookupError, TypeError) as error:
        checked.faults.append(f"{_shard(number)}: its files are malformed ({type(error).__name__}: {error})")
    return checked


def _check_shard(checked: _Checked, index: DatasetIndex, number: int, fields: Mapping[str, Any]) -> None:
    """One shard and its sidecars: bytes against records, records against members."""
    name = _shard(number)
    record, tar = _read(checked, index.uri, name, _RECORD)
    if record is None:
        return
    checked.record = {**record, "members": {"array_shape": record["members"]["array_shape"]}}  # the rest is large
    if (record["shard"], record["fingerprint"]) != (number, index.info["fingerprint"]):
        checked.faults.append(f"{name}.json: is for shard {record['shard']}, or has another fingerprint")
    keys = record["members"]["keys"]
    checked.keys = np.array([_hashed(key) for key in keys], np.uint64)
    checked.refused = Counter(refusal.reason for refusal in shards.read_ledger(index.uri, number))
    if tar is not None:
        _check_samples(checked, index.uri, name, record, tar)
    for extra, info in fields.items():
        name = f"fields/{extra}/{shard_name(number)}"
        beside, tar = _read(checked, index.uri, name, _SIDECAR)
        if beside is None:
            continue
        checked.beside[extra] = {key: value for key, value in beside.items() if key != "members"}
        members, extension = beside["members"], f"{extra}.{sidecars.EXTENSIONS[extra]}"
        if (beside["fingerprint"], checksums.recorded(beside, "shard_")) != (
            info["fingerprint"],
            checksums.recorded(record),
        ):
            checked.faults.append(f"{name}.json: was made for another shard or with another fingerprint")
        if not set(members["keys"]) <= set(keys) or beside["samples"] + sum(beside["missing"].values()) != len(keys):
            checked.faults.append(f"{name}.json: its keys are not those of the shard")
        places = zip(members["offset"], members["size"], strict=True)
        expected = {f"{key}.{extension}": place for key, place in zip(members["keys"], places, strict=True)}
        if tar is not None and _members(tar) != expected:
            checked.faults.append(f"{name}.tar: its members are not those of its record")


def _read(checked: _Checked, dataset: str, name: str, entries: set[str]) -> tuple[dict[str, Any] | None, bytes | None]:
    """A record and the tar that it describes; what is missing or altered is noted, and then None."""
    uri = storage.join(dataset, name)
    record, tar = None, None
    try:
        record = dict(storage.read_json(f"{uri}.json"))
        absent = sorted(entries - record.keys())
        if not {"checksum", "sha256"} & record.keys():
            absent.append("checksum")
        if absent:
            checked.faults.append(f"{name}.json: lacks {', '.join(absent)}")
            return None, None
        tar = storage.read_bytes(f"{uri}.tar")
    except (FileNotFoundError, ValueError):
        what = f"{name}.json" if record is None else f"{name}.tar"
        checked.faults.append(f"{what}: {'is missing' if not storage.exists(f'{dataset}/{what}') else 'is not JSON'}")
        return record, None
    checked.bytes += len(tar)
    written = checksums.recorded(record)
    found = checksums.checksum([tar], checksums.algorithm_of(written))
    if len(tar) != record["bytes"]:
        checked.faults.append(f"{name}.tar: has {len(tar)} bytes, its record says {record['bytes']}")
    elif found != written:
        checked.faults.append(f"{name}.tar: has {checksums.brief(found)}, its record says {checksums.brief(written)}")
    else:
        return record, tar
    return record, None


def _check_samples(checked: _Checked, dataset: str, name: str, record: Mapping[str, Any], tar: bytes) -> None:
    """Every sample lies where the record says, and their scores add up to what it says."""
    members = Members(**record["members"])
    found, size = _members(tar), 2 * int(np.prod(members.array_shape))
    samples = []
    for place, key in enumerate(members.keys):
        array = found.get(f"{key}.latents.npy", (0, 0))
        text = members.json_offset[place], members.json_size[place]
        if found.get(f"{key}.json") != text or sum(array) != members.array_offset[place] + size:
            checked.faults.append(f"{name}.tar: sample {key} is not where the record says")
            return
        samples.append(shards.read_sample(memoryview(tar), members, place))
    if len(found) != 2 * len(members.keys) or record["samples"] != len(members.keys):
        checked.faults.append(f"{name}.tar: has {len(found)} members, its record says {2 * record['samples']}")
    if shards.ssim_statistics([sample.ssim for sample in samples]) != record["ssim"]:
        checked.faults.append(f"{name}.tar: the ssim of its samples does not add up to that of its record")
    if not columns.compared(dataset, record["shard"], [shards.sample_metadata(sample) for sample in samples]):
        checked.faults.append(
            f"columns/{shard_name(record['shard'])}.parquet: says otherwise than the shard; remove it"
        )


def _members(tar: bytes) -> dict[str, tuple[int, int]]:
    """Where each member's content lies and how long it is; nothing where it is no tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as file:
            return {info.name: (info.offset_data, info.size) for info in file}
    except tarfile.TarError:
        return {}


def _strays(index: DatasetIndex, fields: Mapping[str, Any]) -> list[str]:
    """Files that belong to no committed shard, nor to a job that was stopped before it changed anything."""
    names = [shard_name(number) for number in index.shards]
    pairs = {f"{name}.{kind}" for name in names for kind in ("tar", "json")}
    parts = 2 + len(index.info.get("appended", ()))  # one more: of an append that was stopped as it began
    expected = {
        "": ROOT_FILES | {"shards", "quarantine", "fields", columns.DIRECTORY, "parts", lock.NAME, KEPT},
        "shards": pairs,
        "quarantine": {f"{name}.jsonl" for name in names},
        columns.DIRECTORY: {f"{name}.parquet" for name in names},
        "parts": {f"part-{part:06d}.parquet" for part in range(0 if "shapes" in index.info else 1, parts)},
        "fields": {*fields, *(f"{name}.json" for name in fields)},
        **{f"fields/{name}": pairs for name in fields},
    }
    return [
        f"{storage.join(directory, name) if directory else name}: belongs to no committed shard"
        for directory, known in expected.items()
        for name in storage.names(storage.join(index.uri, directory) if directory else index.uri)
        if name not in known
    ]


def _disagreements(index: DatasetIndex, checked: Sequence[_Checked], fields: Mapping[str, Any]) -> list[str]:
    """Between the records and whatever was made from them."""
    records = [shard.record for shard in checked if shard.record is not None]
    if len(records) < len(checked):
        return []  # named already, and no sum would be right
    faults = []
    rows = pq.read_table(pa.BufferReader(shards.index_bytes(records))).to_pylist()
    for row, stored in zip(rows, index.table.to_pylist(), strict=True):
        if row != stored:
            faults.append(f"index.parquet: {'; '.join(differences(stored, row))} (record of shard {row['shard']})")
    recovered: dict[int, Counter[str]] = {}
    for record in records:
        for value in record["retry_of"].values():
            recovered.setdefault(value["shard"], Counter())[value["reason"]] += 1
    reasons: Counter[str] = Counter()
    for shard, record in zip(checked, records, strict=True):
        left = Counter(record["reasons"]) - recovered.get(shard.shard, Counter())
        reasons += left
        if left != shard.refused:
            faults.append(
                f"quarantine/{shard_name(shard.shard)}.jsonl: lists {dict(shard.refused)}, the records say {dict(left)}"
            )
    sums = {
        "samples": sum(record["samples"] for record in records),
        "quarantined": reasons.total(),
        "shards": len(records),
        "bytes": sum(record["bytes"] for record in records),
    }
    stored = {name: index.info.get(name) for name in sums}
    faults += [f"dataset.json: {difference} (records)" for difference in differences(stored, sums)]
    for name, info in fields.items():
        beside = [shard.beside[name] for shard in checked if name in shard.beside]
        if len(beside) == len(checked):
            expected = {**sidecars.totals(beside), "complete": True}
            stored = {key: info.get(key) for key in expected}
            faults += [f"fields/{name}.json: {difference} (records)" for difference in differences(stored, expected)]
    return faults


def _repeated_keys(index: DatasetIndex, checked: Sequence[_Checked]) -> list[str]:
    """Keys that occur twice; 8 bytes of memory a sample."""
    hashes = np.concatenate([shard.keys for shard in checked])
    values, counts = np.unique(hashes, return_counts=True)
    twice = values[counts > 1]
    if not len(twice):
        return []
    seen: Counter[str] = Counter()
    for shard in checked:
        if np.isin(shard.keys, twice).any():
            seen.update(storage.read_json(shards.record_uri(index.uri, shard.shard))["members"]["keys"])
    return [f"sample {key}: appears {count} times" for key, count in seen.items() if count > 1]


def _hashed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _other_recipe(index: DatasetIndex, recipe: Recipe, fields: Mapping[str, Any]) -> list[str]:
    """What this recipe would make otherwise; fields only where it asks for them."""
    stored = index.info.get("computed_from", {})
    here = as_begun(fingerprint(recipe)[1], stored)
    faults = [f"dataset.json: {difference}" for difference in differences(stored, here)]
    for name in recipe.data.fields:
        if name not in fields:
            faults.append(f"fields/{name}.json: is missing")
            continue
        covers = identity(name, recipe)[1]
        faults += [f"fields/{name}.json: {d}" for d in differences(fields[name]["computed_from"], covers)]
    return faults
