"""One bundle measured on samples of a dataset, a video and a picture at a time.

What was measured is kept under ``parts/`` of the output, by all that decides it: a run that was stopped goes on where
it was, a longer one adds to a shorter one, and workers of a cluster fill it in any order (`cinemo.evaluation.cluster`).
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.data.dataset.shards import DatasetIndex, Members, fetch_sample, record_uri
from cinemo.evaluation.calibration import Calibration, levels
from cinemo.evaluation.extractors import LatentStatistics, load_extractors
from cinemo.evaluation.measurements import Measurements, Pair, Result, Seen, Shown
from cinemo.evaluation.metrics.frames import flow_speed, motion
from cinemo.evaluation.noise import compare_noise
from cinemo.evaluation.protocols import Protocol
from cinemo.methods import method_class
from cinemo.types import InputError, LatentSample

SHOWN = 8  # videos on the page
Say = Callable[[str], None]
Picture = tuple[str, np.ndarray, str]
"""A name, (H, W, 3) uint8 and a prompt."""


@dataclass(frozen=True)
class Plan:
    """How bundles are measured.

    Attributes:
        limit: samples to measure, spread evenly over the dataset.
        pictures: of them, those that the control of motion is measured with.
        values: of that control, at most, from the least motion to the most.
        seeds: videos of each picture and value.
        steps: sampling steps; None: what a bundle's recipe says.
        seed: of the videos; of several seeds the first.
        noise: also compare the method's ways to draw the initial noise, on the same pictures.
        first_frame: whether the given frame counts in what networks see of a video.
        extractors: networks that metrics need, as ``NAME=PLACE`` (`cinemo.evaluation.extractors`).
        protocol: of a paper, to say where this departs from it.
    """

    limit: int = 4
    pictures: int = 4
    values: int = 5
    seeds: int = 1
    steps: int | None = None
    seed: int = 0
    noise: bool = False
    first_frame: bool = True
    extractors: tuple[str, ...] = ()
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("pictures", 0), ("values", 2), ("seeds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least {least}")


class SpreadSamples(Sequence[LatentSample]):
    """Up to ``count`` samples at equal distances over a dataset, each fetched when it is asked for."""

    def __init__(self, index: DatasetIndex, count: int) -> None:
        self._index, self._ends = index, np.cumsum(index.samples_of_shards)
        total = int(self._ends[-1])
        self._positions = np.linspace(0, total - 1, min(count, total)).round().astype(int)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        position = self._positions[number]
        place = int(np.searchsorted(self._ends, position, side="right"))
        shard = self._index.shards[place]
        members = Members(**storage.read_json(record_uri(self._index.uri, shard))["members"])
        return fetch_sample(self._index.uri, shard, members, int(position - (self._ends[place - 1] if place else 0)))


class Measurer:
    """Measures one bundle as a plan says, and keeps it under ``output``.

    Raises:
        InputError: no bundle or dataset there, or they do not fit together.
    """

    def __init__(self, location: str, index: DatasetIndex, output: str, plan: Plan, device: str | None = None) -> None:
        self.location, self.plan = location, plan
        self.samples = SpreadSamples(index, plan.limit)
        self.bundle = bundle = load_bundle(location, device)
        _check_fit(bundle, self.samples[0], index.uri)
        self.extractors = load_extractors(plan.extractors, bundle.device)
        self.extractors["latents"] = LatentStatistics(bundle.vae, bundle.digest)
        self.identities = {name: extractor.identity for name, extractor in self.extractors.items()}
        self._parts = storage.join(output, "parts")
        asked = [bundle.digest, plan.steps, plan.seed, plan.first_frame, sorted(map(str, self.identities.items()))]
        self._videos = storage.join(self._parts, _digest(asked))

    def controls(self, sample: LatentSample) -> dict[str, Any]:
        """What is asked for a video like the sample's own."""
        return self.bundle.method.controls_like(self.bundle.recipe, sample)

    def sample(self, number: int) -> tuple[LatentSample, Seen, Pair | None]:
        """Measure one sample, or read what was measured; its videos too, of the first `SHOWN`."""
        sample, show = self.samples[number], number < SHOWN
        uri = storage.join(self._videos, sample.key)
        kept, frames = f"{uri}.npz", f"{uri}.frames.npz"
        if storage.exists(kept) and (not show or storage.exists(frames)):
            try:
                seen = Seen.from_bytes(storage.read_bytes(kept))
                if not show:
                    return sample, seen, None
                with np.load(io.BytesIO(storage.read_bytes(frames)), allow_pickle=False) as file:
                    return sample, seen, Pair(sample.key, file["real"], file["made"], sample.caption)
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise InputError(f"{uri}*.npz: is damaged ({error}); remove it, it is then measured again") from None
        real_FHWC = self._decoded(sample)
        wanted = {"steps": self.plan.steps, "seed": self.plan.seed, **self.controls(sample)}
        made_FHWC = animate(self.bundle, AnimateRequest(real_FHWC[0], sample.caption, **wanted)).frames_FHWC
        pair = Pair(sample.key, real_FHWC, made_FHWC, sample.caption)
        seen = Seen.of(pair, self.extractors, self.plan.first_frame)
        if show:
            content = io.BytesIO()
            np.savez_compressed(content, real=real_FHWC, made=made_FHWC)
            storage.write_bytes(frames, content.getvalue())
        storage.write_bytes(kept, seen.to_bytes())
        return sample, seen, pair if show else None

    def picture(self, number: int) -> Picture:
        """The first frame of a sample, with its caption."""
        sample = self.samples[number]
        return sample.key, self._decoded(sample)[0], sample.caption

    def moved(self, picture: Picture) -> np.ndarray | None:
        """Animate a picture at every value and seed, or read it: (values, seeds, 2) of 1 - SSIM and pixels a frame;
        None where the method has no control of motion."""
        if self.control is None:
            return None
        (key, picture_HWC, prompt), (name, values), plan = picture, self.control, self.plan
        seeds = range(plan.seed, plan.seed + plan.seeds)
        sha = hashlib.sha256(picture_HWC.tobytes()).hexdigest()
        asked = _digest([self.bundle.digest, plan.steps, list(seeds), name, values, sha, prompt])
        uri = storage.join(self._parts, "motion", f"{key}-{asked}.json")
        if not storage.exists(uri):
            made = [
                [
                    _moved(self.bundle, picture_HWC, prompt, {name: value, "steps": plan.steps, "seed": seed})
                    for seed in seeds
                ]
                for value in values
            ]
            storage.write_json(uri, made)
        try:
            table = np.array(storage.read_json(uri), np.float64)
            if table.shape != (len(values), plan.seeds, 2):
                raise ValueError(f"{table.shape}, expected {(len(values), plan.seeds, 2)}")
        except ValueError as error:
            raise InputError(f"{uri}: is damaged ({error}); remove it, it is then measured again") from None
        return table

    @property
    def control(self) -> tuple[str, tuple[int, ...]] | None:
        """The control of how much moves, and the values that are measured."""
        known = method_class(self.bundle.recipe).controls_type.motion_values(self.bundle.recipe)
        return None if known is None else (known[0], levels(known[1], self.plan.values))

    def calibration(self, pictures: Sequence[Picture], say: Say) -> Calibration | None:
        """None where the method has no control of motion, or there are no pictures."""
        if self.control is None or not pictures:
            return None
        tables = []
        for number, picture in enumerate(pictures):
            tables.append(self.moved(picture))
            say(f"{self.bundle.recipe.name}: motion control {number + 1}/{len(pictures)}: {picture[0]}")
        measured_PLS2 = np.array(tables, np.float64)
        return Calibration(*self.control, measured_PLS2[..., 0], measured_PLS2[..., 1])

    def pictures(self) -> Iterator[int]:
        """Numbers of the samples whose first frames measure the control: spread over those that are measured."""
        yield from np.linspace(0, len(self.samples) - 1, min(self.plan.pictures, len(self.samples))).round().astype(int)

    def result(self, say: Say) -> Result:
        """Everything that the plan asks for."""
        bundle, plan, total = self.bundle, self.plan, len(self.samples)
        measurements, rows, shown = Measurements(), [], []
        for number in range(total):
            sample, seen, pair = self.sample(number)
            measurements.add(sample.key, seen)
            controls = self.controls(sample)
            about = {"clip": sample.clip_id, "frame_interval": sample.frame_interval}
            rows.append(about | controls | dict(seen.figures))
            if pair is not None:
                shown.append(Shown(sample.clip_id, sample.caption, _said(controls), pair.real_FHWC, pair.made_FHWC))
            say(f"{bundle.recipe.name}: sample {number + 1}/{total}: {sample.clip_id}")
        pictures = [self.picture(number) for number in self.pictures()]
        return Result(
            self.location,
            bundle.recipe.name,
            bundle.digest,
            plan.steps or bundle.recipe.sample.steps,
            measurements.estimates(),
            rows,
            shown,
            self.calibration(pictures, say),
            self.identities,
            compare_noise(bundle, pictures, plan.steps, plan.seed) if plan.noise else {},
        )

    def _decoded(self, sample: LatentSample) -> np.ndarray:
        return self.bundle.decoder.decode(torch.from_numpy(np.array(sample.latents_FCHW, np.float32)))


def _moved(
    bundle: ModelBundle, picture_HWC: np.ndarray, prompt: str, controls: Mapping[str, Any]
) -> tuple[float, float]:
    """1 - SSIM and pixels a frame of what is generated."""
    frames_FHWC = animate(bundle, AnimateRequest(picture_HWC, prompt, **controls)).frames_FHWC
    return motion(frames_FHWC), flow_speed(frames_FHWC)


def _check_fit(bundle: ModelBundle, sample: LatentSample, data: str) -> None:
    height, width = (side // bundle.vae.downscale for side in bundle.recipe.data.size)
    expected = (bundle.recipe.data.frames, bundle.vae.latent_channels, height, width)
    if sample.latents_FCHW.shape != expected:
        raise InputError(
            f"--data {data}: its latents are {sample.latents_FCHW.shape}, bundle {bundle.recipe.name} makes {expected} "
            "(frames, channels, rows, columns); give a dataset made with that recipe"
        )


def _said(controls: Mapping[str, Any]) -> str:
    """``, motion bucket 3`` of controls, for people."""
    return "".join(f", {name.replace('_', ' ')} {value}" for name, value in controls.items())


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
