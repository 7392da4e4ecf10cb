"""What a run will cost, measured on a few of its clips before it starts. Runs in this process, on one core."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import torch

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data import stages
from cinemo.data.identity import encoder_dtype
from cinemo.data.manifest import read_manifest
from cinemo.data.plan import make_plan
from cinemo.types import keyed_seed

SAMPLE_CLIPS = 12


def plan_only(recipe: Recipe, manifest: str, output: str, limit: int | None = None) -> dict[str, Any]:
    """Measure a seeded sample of clips, write the estimate to ``<output>/plan.json`` and return it.

    Seconds are wall seconds of one process; the encoder is measured only where its device is present.

    Raises:
        InputError: bad manifest, or an output that cannot be written.
    """
    data = recipe.data
    plan = make_plan(read_manifest(manifest, limit), recipe)
    output = storage.absolute(output)
    storage.check_writable(output)
    clips = len(plan.clips)
    generator = np.random.default_rng(keyed_seed(data.seed, "estimate"))
    positions = np.sort(generator.choice(clips, min(SAMPLE_CLIPS, clips), replace=False))
    planned = plan.take(positions, positions // plan.clips_per_shard)

    encoder = None
    if not data.encode_gpus or torch.cuda.is_available():
        encoder = stages.Encoder(data, recipe.encoders.vae, recipe.encoders.latent, encoder_dtype(recipe))
    rows = []
    for number in range(len(planned)):
        table = stages.score(stages.decode(planned.slice(number, 1), data), data)
        if encoder:
            table = encoder(table)
        rows += table.drop_columns(["latents" if encoder else "frames"]).to_pylist()

    used = [row for row in rows if not row["reason"]]
    refused = Counter(row["reason"] for row in rows if row["reason"] and row["view"] == 0)
    seconds = {
        stage: sum(row[f"{stage}_seconds"] for row in rows) / len(planned) for stage in ("decode", "score", "encode")
    }
    on_core = seconds["decode"] + seconds["score"]
    quarantine_share = sum(refused.values()) / len(planned)
    samples = round(clips * (1 - quarantine_share)) * data.views
    cores = os.cpu_count() or 1
    rates = {
        "decode_and_score_clips_per_second_per_core": 1 / on_core,
        "encode_clips_per_second_per_encoder": 1 / seconds["encode"] if encoder and seconds["encode"] else None,
    }
    limits = {"decode and score": cores / on_core}
    if rates["encode_clips_per_second_per_encoder"]:
        limits["encode"] = data.encode_actors * rates["encode_clips_per_second_per_encoder"]
    bottleneck = min(limits, key=lambda stage: limits[stage])
    latent_bytes = _sample_bytes(used[0]["shape"]) if encoder and used else None
    estimate = {
        "recipe": recipe.name,
        "clips": clips,
        "shards": plan.shards,
        "expected_samples": samples,
        "expected_quarantine_share": quarantine_share,
        "refused_in_sample": dict(refused),
        "measured_clips": len(planned),
        "seconds_per_clip": seconds if encoder else {**seconds, "encode": None},
        **rates,
        "cores_here": cores,
        "bottleneck": bottleneck,
        "clips_per_second_here": limits[bottleneck],
        "decode_core_hours": clips * on_core / 3600,
        "encoder_hours": clips * seconds["encode"] / 3600 if encoder else None,
        "bytes": samples * latent_bytes if latent_bytes else None,
    }
    storage.write_json(storage.join(output, "plan.json"), estimate)
    return estimate


def _sample_bytes(shape: list[int]) -> int:
    """Size of one sample in a shard: two member headers, metadata and latents, each padded to 512 bytes."""
    return 2 * 512 + 512 + (128 + 2 * int(np.prod(shape)) + 511) // 512 * 512
