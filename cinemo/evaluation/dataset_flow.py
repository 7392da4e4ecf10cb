"""A dataset report's part on stored flow: how fast clips are beside their SSIM, and whether the flow can be right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cinemo import storage
from cinemo.cache import FileCache
from cinemo.config import DataConfig, Shape
from cinemo.data.dataset import fields, sidecars
from cinemo.data.dataset.shards import DatasetIndex, pixels
from cinemo.data.loading.reader import ShardReader
from cinemo.evaluation.calibration import rank_correlation
from cinemo.evaluation.figures import speed_scatter
from cinemo.evaluation.page import chart, section
from cinemo.media.flow import consistency, dense_flow, speed
from cinemo.types import ClipError, InputError, LatentSample, RunError

_SHARDS, _SAMPLES = 8, 64  # that are read, and of each
_CLIPS = 4  # whose flow is also measured backwards


def flow_section(dataset: DatasetIndex) -> list[str]:
    """Nothing where flow is not stored."""
    place = sidecars.info_uri(dataset.uri, "flow")
    if not storage.exists(place) or not storage.read_json(place).get("complete"):
        return []
    samples = _samples(dataset)
    if not samples:
        return []
    speeds = [speed(sample.fields["flow"]) * 512 / min(_shape(sample)[1:]) for sample in samples]
    motion = [1 - sample.ssim for sample in samples]
    rank, agree = rank_correlation(motion, speeds), _consistent(dataset, samples)
    text = (
        "The mean length of stored optical flow, which is the motion strength of a method that sees flow, in pixels a "
        f"frame where the shorter side has 512. It is {np.median(speeds):.3g} in the median of {len(samples)} samples, "
        f"{np.quantile(speeds, 0.9):.3g} at the ninth tenth. "
    )
    if rank is not None:
        text += (
            f"Its rank correlation with 1 - SSIM is {rank:.2f}: what flickers without moving has motion by SSIM alone. "
        )
    if agree is not None:
        text += (
            f"Forwards and backwards flow agree on {agree:.0%} of the pixels of {min(_CLIPS, len(samples))} clips; the "
            "rest is covered or leaves the picture, or is not found."
        )
    return [section("Flow", text), chart(speed_scatter(motion, speeds), "Each dot is a sample.", narrow=True)]


def _samples(dataset: DatasetIndex) -> list[LatentSample]:
    """Some of the first ones of shards at equal distances, that have flow."""
    reader = ShardReader(dataset, ("flow",), FileCache(1e9), keep=1)
    counts = dataset.samples_of_shards
    places = np.unique(np.linspace(0, len(counts) - 1, min(_SHARDS, len(counts))).round().astype(int)).tolist()
    found = []
    for place in places:
        try:
            shard = reader.get(place)
            found += [shard.sample(index) for index in range(min(_SAMPLES, int(counts[place])))]
        except (ClipError, InputError, RunError, OSError):
            continue  # what is damaged is verify's to say
    return [sample for sample in found if "flow" in sample.fields]


def _shape(sample: LatentSample) -> Shape:
    return pixels(sample.latents_FCHW.shape)


def _consistent(dataset: DatasetIndex, samples: Sequence[LatentSample]) -> float | None:
    """Share of pixels whose flow from the first frame to the second is undone by the one back."""
    data = DataConfig.model_validate(dataset.info["recipe"]["data"]) if "recipe" in dataset.info else DataConfig()
    shares = []
    for sample in samples[:: max(1, len(samples) // _CLIPS)][:_CLIPS]:
        view = {"uri": sample.uri, "start_frame": sample.start_frame, "frame_interval": sample.frame_interval}
        try:
            (frames_FHWC,) = fields.decode_again([view], data.of_shape(_shape(sample)), 2)
        except (ClipError, InputError, RunError, OSError):
            continue
        size = frames_FHWC.shape[1:3]
        there, back = dense_flow(frames_FHWC, size)[0], dense_flow(frames_FHWC[::-1], size)[0]
        shares.append(float(consistency(there, back).mean()))
    return float(np.mean(shares)) if shares else None
