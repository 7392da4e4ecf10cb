"""What a run will cost, measured on a few of its clips before it starts. Runs in this process, on one core.

Every figure comes with a range: the 5th and 95th percentile of the figure over seeded resamples of the measured clips
(bootstrap); of the share of refused clips the 90% Wilson interval, since a small sample may well have none.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cinemo import s3, storage
from cinemo.accelerators import DEFAULT_ACCELERATOR, Accelerator, accelerator, peak_flops
from cinemo.config import DataConfig, Recipe, Shape
from cinemo.data.dataset.identity import encoder_dtype
from cinemo.data.manifest.columns import Columns
from cinemo.data.precompute import stages
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.journal import SEGMENT
from cinemo.data.precompute.nodes import Machines
from cinemo.data.precompute.plan import Plan, PlannedRows, plan_manifest
from cinemo.data.precompute.prices import Prices, money
from cinemo.data.precompute.probing import measured_here
from cinemo.data.precompute.shapes import kinds
from cinemo.lock import HEARTBEAT_SECONDS
from cinemo.networks.vae_cost import Encoding, encoding
from cinemo.progress import counted
from cinemo.types import InputError, keyed_seed

SAMPLE_CLIPS = 32
SAMPLE_SECONDS = 120.0  # slow clips: no more of them after so long, but at least `_LEAST`
OBJECT_STORE_BYTES = 2 << 30
_LEAST = 4
_RESAMPLES = 500
_Z = 1.645  # 90%
_STAGES = ("decode", "score", "encode")
# Share of an accelerator's peak that encoding reaches, where it cannot be measured: low, usual, high.
ASSUMED_SHARE = (0.2, 0.3, 0.4)
MEASURED, GIVEN, ASSUMED = "measured here", "given", "assumed"

Range = dict[str, float]


def plan_only(
    recipe: Recipe,
    manifest: str,
    output: str,
    limit: int | None = None,
    prices: Prices | None = None,
    columns: Columns | None = None,
    names_as_captions: bool = False,
    append: str | None = None,
    machines: Machines | None = None,
    mfu: float | None = None,
) -> dict[str, Any]:
    """Measure a seeded sample of clips, write the estimate to ``<output>/plan.json`` and return it.

    Seconds are wall seconds of one process. The encoder is measured only where its device is present; otherwise its
    speed is that of ``prices``, or else follows from its FLOPs and a share of an accelerator's peak.

    Args:
        machines: what the run is planned for, beside this machine; their cores are taken to be as fast as those here.
        mfu: that share; None: assumed.

    Raises:
        InputError: bad manifest, an output that cannot be written, nothing to append, or machines that the recipe does
            not fit.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu is {mfu:g}, expected a share of the peak above 0 and up to 1")
    plan, prefix = plan_manifest(manifest, recipe, limit, columns, names_as_captions)
    plan.clips.check_buckets()
    output = storage.absolute(output)
    given = prices.clips_per_accelerator_second if prices else None
    known = Known(recipe, plan, output, given, machines, mfu)  # before anything is written: they may not fit
    storage.check_writable(output)
    if append:
        dataset = Dataset.open(output, recipe, plan, append, prefix)
        dataset.load()
        plan = dataset.plan
        if not len(plan):
            raise InputError(f"{output}: has all clips of {manifest} already; there is nothing to append")
        known = Known(recipe, plan, output, given, machines, mfu)
    plan, clips = replace(plan, kinds=None), len(plan)  # of the measured clips it is found out below
    rng = np.random.default_rng(keyed_seed(recipe.data.seed, "estimate"))
    positions = np.sort(plan.first_clip + rng.choice(clips, min(SAMPLE_CLIPS, clips), replace=False))
    shapes = _shapes(recipe, plan, positions)
    known.relative_pixels = float(np.mean([math.prod(shape) for shape in shapes.values()])) / math.prod(
        recipe.data.shapes[0]
    )
    sample, memory = _measure(recipe, plan, rng.permutation(positions), shapes, known.encoding)

    figures = known.figures(sample)
    low, high = _wilson(sum(clip["refused"] for clip in sample), len(sample))
    shares = rng.uniform(*known.share[::2], _RESAMPLES)
    again = [
        known.figures([sample[k] for k in chosen], share)
        for chosen, share in zip(rng.integers(0, len(sample), (_RESAMPLES, len(sample))), shares, strict=True)
    ]
    ranged = {}
    for name, value in figures.items():
        ranged[name] = _range(value, [other[name] for other in again if name in other])
    ranged["quarantine_share"] |= {"low": low, "high": high}
    for name in {"samples", "bytes"} & ranged.keys():  # as sure as the share of clips that give any
        kept = 1 - figures["quarantine_share"] or 1.0
        whole = ranged[name]["value"] / kept
        ranged[name]["low"] = min(ranged[name]["low"], whole * (1 - high))
        ranged[name]["high"] = max(ranged[name]["high"], whole * (1 - low))
    ranged["memory_per_node_bytes"] = memory
    spent = {stage: float(np.mean([clip[stage] for clip in sample])) for stage in _STAGES}
    estimate: dict[str, Any] = {
        "recipe": recipe.name,
        "clips": clips,
        "shards": plan.shards,
        "measured_clips": len(sample),
        **({"shapes": _counted(recipe.data, sample)} if recipe.data.other_shapes else {}),
        "refused_in_sample": dict(Counter(clip["reason"] for clip in sample if clip["refused"])),
        "seconds_per_clip": {**spent, "encode": spent["encode"] if known.source == MEASURED else None},
        "encode_speed": known.source,
        "encode": known.assumptions(),
        "cores_here": known.cores,
        "bottleneck": known.bottleneck(figures, spent),
        "machines": str(machines) if machines else None,
        "ranges": f"5th to 95th percentile of {_RESAMPLES} resamples of the measured clips, and of the assumed share; "
        "refused clips, and with them samples and bytes: 90% Wilson interval; "
        "memory: without and with a full object store and a shard being committed",
        "figures": ranged,
    }
    if prices:
        costs = [money(known.paid(other), prices) for other in again]
        estimate["costs"] = {
            item: _range(value, [other[item] for other in costs])
            for item, value in money(known.paid(figures), prices).items()
        }
        estimate["currency"] = prices.currency
    storage.write_json(storage.join(output, "plan.json"), estimate)
    return estimate


def _shapes(recipe: Recipe, plan: Plan, positions: np.ndarray) -> dict[int, Shape]:
    """The shape of the clip at each of some ascending positions."""
    data = recipe.data
    if not data.other_shapes:
        return dict.fromkeys(positions.tolist(), data.shapes[0])
    part = replace(plan, chosen=plan.manifest_rows(positions))
    found = kinds(part, data, functools.partial(measured_here, seconds=data.clip_timeout))
    return {place: data.shapes[kind] for place, kind in zip(positions.tolist(), found.tolist(), strict=True)}


def _measure(
    recipe: Recipe, plan: Plan, positions: np.ndarray, shapes: Mapping[int, Shape], unmeasured: Encoding | None
) -> tuple[list[dict[str, Any]], Range]:
    """Seconds of each stage, sample bytes and fault of some clips, one after the other; and the memory of a node.

    Args:
        shapes: of the clips, by position.
        unmeasured: what encoding a frame takes, where it cannot be done here.
    """
    data = recipe.data
    encoder, sample, decoding_memory, begun = None, [], 0, time.perf_counter()
    for number, position in counted("measuring clips", enumerate(positions), len(positions), "clips"):
        if number >= _LEAST and time.perf_counter() - begun > SAMPLE_SECONDS:
            break
        place, shape = np.array([position]), shapes[int(position)]
        row = PlannedRows(plan, place, plan.shards_of(place)).slice()
        row = row.append_column("video_shape", pa.array([shape], pa.list_(pa.int32())))
        table = stages.score(stages.decode(row, data), data)
        if encoder is None:
            decoding_memory = _peak_memory()
        if encoder is None and unmeasured is None:
            encoder = stages.Encoder(data, recipe.encoders.vae, recipe.encoders.latent, encoder_dtype(recipe))
        table = encoder(table) if encoder else table
        rows = table.drop_columns(["latents" if encoder else "frames"]).to_pylist()
        reasons = [row["reason"] for row in rows if row["reason"]]
        clip = {stage: sum(row[f"{stage}_seconds"] for row in rows) for stage in _STAGES}
        latents = [_latents(shape, unmeasured) if unmeasured else row["shape"] for row in rows]
        size = None if reasons else sum(map(_sample_bytes, latents))
        reason = reasons[0] if reasons else None
        sample.append({**clip, "refused": bool(reasons), "reason": reason, "bytes": size, "shape": shape})
    cores = os.cpu_count() or 1
    encoding_memory = _peak_memory() * encoders(data, cores) if encoder else 0
    processes = float(encoding_memory if data.together else cores * decoding_memory + encoding_memory)
    shard = 2 * plan.clips_per_shard * max((clip["bytes"] or 0 for clip in sample), default=0)
    full = processes + OBJECT_STORE_BYTES + shard
    return sample, {"value": full, "low": processes, "high": full}


def _latents(shape: Shape, encoding: Encoding) -> tuple[int, ...]:
    """The latents FCHW of a video."""
    frames, height, width = shape
    return frames, encoding.latents_CHW[0], height // 8, width // 8


def encoders(data: DataConfig, cores: int) -> int:
    """Encoder processes on this machine: as many as the recipe says, or as there is room for."""
    if data.encode_actors:
        return data.encode_actors
    return max(1, int(torch.cuda.device_count() / data.encode_gpus)) if data.encode_gpus else cores


class Known:
    """What does not depend on the sample: the sizes of the plan, where things lie, and the machines.

    ``encoding``: what a frame takes, where encoding cannot be measured here. ``source``: of the encoder's speed.
    ``share``: of an accelerator's peak that it reaches, low, usual and high, where it is assumed.
    ``relative_pixels``: of a clip on average, by those of one of the recipe's own shape.

    Raises:
        InputError: the recipe encodes on accelerators and ``machines`` have none, or the other way round.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        output: str,
        clips_per_accelerator_second: float | None,
        machines: Machines | None = None,
        mfu: float | None = None,
    ) -> None:
        self.data, self.plan, self.cores = recipe.data, plan, os.cpu_count() or 1
        self.machines, self.on_accelerator = machines, recipe.data.encode_gpus > 0
        if machines and self.on_accelerator != bool(machines.accelerators):
            has, needs = ("no", "on them") if self.on_accelerator else (str(machines.accelerators), "on CPUs")
            raise InputError(
                f"--on has {has} accelerators, but recipe {recipe.name} encodes {needs}; "
                f"--set data.encode_gpus={0 if self.on_accelerator else 1} changes that"
            )
        self.encoders = encoders(recipe.data, self.cores)
        self.accelerator = machines.kinds[0] if machines and machines.kinds else accelerator(DEFAULT_ACCELERATOR)
        self.encoding, self.source, self.given_speed, self.peak_here = None, MEASURED, None, 0.0
        self.relative_pixels = 1.0
        self.share = (mfu,) * 3 if mfu else ASSUMED_SHARE
        if self.on_accelerator and torch.cuda.is_available():
            self.peak_here = peak_flops(torch.device("cuda", 0), torch.bfloat16)
        elif self.on_accelerator:
            self.encoding = encoding(recipe.encoders.vae, recipe.data.size)
            self.given_speed = clips_per_accelerator_second
            self.source = GIVEN if self.given_speed else ASSUMED
        self.remote_output = storage.is_remote(output)
        first = plan.clips.read(0, 1)["uri"][0].as_py()
        self.remote_clips = first.startswith("s3://")

    def figures(self, sample: Sequence[Mapping[str, Any]], share: float | None = None) -> dict[str, float]:
        """All figures that follow from some measured clips, and from a share of the peak other than the usual one."""
        clips, data = len(self.plan), self.data
        share = share or self.share[1]
        decoding = float(np.mean([clip["decode"] + clip["score"] for clip in sample]))
        encoding = float(np.mean([clip["encode"] for clip in sample]))
        if self.source != MEASURED:
            # Of one accelerator, which may be shared by several encoders.
            encoding = 1 / self._clips_per_second(self.accelerator, encoding, share)
        refused = float(np.mean([clip["refused"] for clip in sample]))
        sizes = [clip["bytes"] for clip in sample if clip["bytes"]]
        figures = {
            "quarantine_share": refused,
            "samples": clips * (1 - refused) * data.views,
            "clips_per_second_per_core": 1 / decoding,
            "core_hours": clips * decoding / 3600,
        }
        rate = self.cores / decoding
        if encoding:
            figures["encode_seconds_per_clip"] = encoding
            if self.on_accelerator:
                figures["clips_per_second_per_accelerator"] = 1 / encoding
                figures["accelerator_hours"] = clips * encoding / 3600
                figures["cores_per_accelerator"] = decoding / encoding
                rate = min(rate, data.encode_gpus * self.encoders / encoding)
            else:  # decoders and encoders share the cores
                figures["encode_clips_per_second_per_core"] = 1 / encoding
                figures["core_hours"] += clips * encoding / 3600
                rate = min(self.cores / (decoding + encoding), self.encoders / encoding)
        figures["clips_per_second_here"] = rate
        figures["hours_here"] = clips / rate / 3600
        if self.machines:
            figures |= self._there(self.machines, decoding, encoding, share)
        if sizes:
            figures["bytes"] = clips * (1 - refused) * float(np.mean(sizes))
        figures["get_requests"], figures["put_requests"] = self._requests(refused, figures)
        return figures

    def _clips_per_second(self, kind: Accelerator, measured: float, share: float) -> float:
        """What one accelerator encodes, with ``measured`` seconds a clip on that of this machine."""
        if self.given_speed:
            return self.given_speed
        if self.encoding is None:
            return kind.half / self.peak_here / measured
        return share * kind.half / self._flops

    @property
    def _flops(self) -> float:
        if self.encoding is None:
            return 0.0
        return self.encoding.flops * self.data.frames * self.data.views * self.relative_pixels

    def _there(self, machines: Machines, decoding: float, encoding: float, share: float) -> dict[str, float]:
        """The machines' speed: an encoder beside an accelerator takes a core, where one is left for decoding."""
        clips, cores = len(self.plan), machines.cores
        if self.on_accelerator:
            processes = math.ceil(machines.accelerators / self.data.encode_gpus)
            decode = max(cores - processes, 1) / decoding
            encode = sum(
                nodes.count * nodes.accelerators * self._clips_per_second(nodes.kind, encoding, share)
                for nodes in machines.nodes
                if nodes.kind
            )
            rates = {"decode_clips_per_second_there": decode, "encode_clips_per_second_there": encode}
            rate = min(decode, encode)
        else:
            rates, rate = {}, cores / (decoding + encoding)
        return rates | {"clips_per_second_there": rate, "days_there": clips / rate / 86400}

    def paid(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures with the hours that cost money: of whole nodes, also where these wait, if ``machines`` are known."""
        if not self.machines:
            return dict(figures)
        hours = figures["days_there"] * 24
        paid = {"core_hours": self.machines.cores * hours, "accelerator_hours": self.machines.accelerators * hours}
        return {**figures, **paid}

    def assumptions(self) -> dict[str, Any] | None:
        """What the encoder's speed was taken from; None where it was measured or given."""
        if self.source != ASSUMED or self.encoding is None:
            return None
        low, usual, high = self.share
        return {
            "flops_per_clip": self._flops,
            "accelerator": self.accelerator.name,
            "peak_flops": self.accelerator.half,
            "share_of_peak": {"value": usual, "low": low, "high": high},
            "autoencoder": "Stable Diffusion's, as encoders.vae is not here" if self.encoding.assumed else None,
        }

    def _requests(self, share: float, figures: Mapping[str, float]) -> tuple[float, float]:
        """S3 requests: clip (some may share one); tar, columns, record and ledger of a shard; journal, index, lock."""
        clips, shards = len(self.plan), self.plan.shards
        gets, puts = (1.0 * clips if self.remote_clips else 0.0), 0.0
        if self.remote_output:
            with_ledger = 1 - (1 - share) ** self.plan.clips_per_shard
            tar = s3.put_requests(int(figures.get("bytes", 0) / shards))
            hours = figures["days_there"] * 24 if self.machines else figures["hours_here"]
            beats = hours * 3600 / HEARTBEAT_SECONDS
            puts += shards * (tar + 2 + with_ledger) + math.ceil(shards / SEGMENT) + 3 + beats
            gets += shards * 2 * (1 - with_ledger) + 10
        return gets, puts

    def bottleneck(self, figures: Mapping[str, float], spent: Mapping[str, float]) -> str:
        """The stage whose speed is that of the whole run: on the machines it is planned for, else here."""
        slow = "decode" if spent["decode"] >= spent["score"] else "score"
        encoding = figures.get("encode_seconds_per_clip")
        if encoding is None:
            return slow
        if not self.on_accelerator:
            return "encode" if encoding > spent[slow] else slow
        if self.machines:
            ahead = figures["decode_clips_per_second_there"] > figures["encode_clips_per_second_there"]
            return "encode" if ahead else slow
        ready = self.data.encode_gpus * self.encoders / encoding
        return "encode" if ready < self.cores / (spent["decode"] + spent["score"]) else slow


def compare(plan: Mapping[str, Any], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predicted against actual: rows of ``what``, ``predicted``, ``low``, ``high`` and ``actual``.

    Args:
        plan: ``plan.json``.
        summary: what `cinemo.data.precompute.graph.run` returns. Totals are compared where both are about the same
            clips; speeds where this run did anything.
    """
    actual: dict[str, float] = {}
    if plan["clips"] == summary["clips"]:
        actual |= {"samples": summary["samples"], "bytes": summary["bytes"]}
        actual["quarantine_share"] = summary["quarantined"] / summary["clips"]
    if summary.get("done"):
        spent, done = summary["stage_seconds"], summary["done"]
        actual["clips_per_second_per_core"] = done / max(spent["decode"] + spent["score"], 1e-9)
        actual["encode_seconds_per_clip"] = spent["encode"] / done
        actual["clips_per_second_here"] = summary["clips_per_second"]
        on_cores = spent["decode"] + spent["score"]
        if "accelerator_hours" not in plan["figures"]:
            on_cores += spent["encode"]
        if done == plan["clips"]:
            actual["core_hours"] = on_cores / 3600
            actual["hours_here"] = summary["seconds"] / 3600
    return [
        {
            "what": name,
            "predicted": figure["value"],
            "low": figure["low"],
            "high": figure["high"],
            "actual": actual[name],
        }
        for name, figure in plan["figures"].items()
        if name in actual
    ]


def _counted(data: DataConfig, sample: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measured clips of each shape."""
    counts = Counter(clip["shape"] for clip in sample)
    return [{"frames": shape[0], "size": list(shape[1:]), "clips": counts[shape]} for shape in data.shapes]


def _range(value: float, resampled: Sequence[float]) -> Range:
    low, high = np.percentile(resampled, (5, 95)) if resampled else (value, value)
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def _wilson(hits: int, count: int) -> tuple[float, float]:
    share, z2 = hits / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _peak_memory() -> int:
    """Bytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _sample_bytes(shape: Sequence[int]) -> int:
    """Size of one sample in a shard: two member headers, metadata and latents, each padded to 512 bytes."""
    return 2 * 512 + 512 + (128 + 2 * int(np.prod(shape)) + 511) // 512 * 512
