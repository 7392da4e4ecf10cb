"""One bundle measured on scenes, a video and a picture at a time.

What was measured is kept under ``parts/`` of the output, by all that decides it: a run that was stopped goes on where
it was, a longer one adds to a shorter one, and workers of a cluster fill it in any order (`cinemo.evaluation.cluster`).
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.evaluation.calibration import Calibration, levels
from cinemo.evaluation.extractors import LatentStatistics, load_extractors
from cinemo.evaluation.measurements import Measurements, Pair, Result, Seen, Shown
from cinemo.evaluation.metrics.distributions import group_of_number
from cinemo.evaluation.metrics.frames import flow_speed, motion
from cinemo.evaluation.noise import compare_noise
from cinemo.evaluation.protocols import Protocol
from cinemo.evaluation.quality import made
from cinemo.evaluation.scenes import Scene, Scenes, as_given
from cinemo.methods import method_class
from cinemo.progress import counted, doing
from cinemo.types import InputError, keyed_seed

VERSION = 2  # of what is measured: parts of another one are measured again
SHOWN = 8  # videos on the page
Say = Callable[[str], None]
Picture = tuple[str, np.ndarray, str]
"""A name, (H, W, 3) uint8 and a prompt."""


@dataclass(frozen=True)
class Plan:
    """How bundles are measured.

    Attributes:
        limit: scenes to measure, spread evenly over the dataset or folder.
        pictures: of them, those that the control of motion is measured with.
        values: of that control, at most, from the least motion to the most.
        seeds: videos of each picture and value.
        steps: sampling steps; None: what a bundle's recipe says.
        seed: of the videos, each of which has a seed of its own by it and its key; of several seeds the first.
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


class Measurer:
    """Measures one bundle as a plan says, and keeps it under ``output``.

    Raises:
        InputError: no bundle there, or the scenes do not fit it.
    """

    def __init__(self, location: str, scenes: Scenes, output: str, plan: Plan, device: str | None = None) -> None:
        self.location, self.plan, self.scenes = location, plan, scenes
        self.bundle = bundle = load_bundle(location, device)
        scenes.check(bundle)
        self.extractors = load_extractors(plan.extractors, bundle.device)
        self.extractors["latents"] = LatentStatistics(bundle.vae, bundle.digest)
        self.identities = {name: extractor.identity for name, extractor in self.extractors.items()}
        self._parts = storage.join(output, "parts")
        networks = sorted(map(str, self.identities.items()))
        asked = [VERSION, bundle.digest, plan.steps, plan.seed, plan.first_frame, networks, scenes.fingerprint]
        self._videos = storage.join(self._parts, _digest(asked))

    def scene(self, number: int) -> tuple[Scene, Seen, Pair | None]:
        """Measure one scene, or read what was measured; its videos too, of the first `SHOWN`."""
        scene, show = self.scenes[number], number < SHOWN
        uri = storage.join(self._videos, scene.key)
        kept, frames = f"{uri}.npz", f"{uri}.frames.npz"
        if storage.exists(kept) and (not show or storage.exists(frames)):
            try:
                seen = Seen.from_bytes(storage.read_bytes(kept))
                if not show:
                    return scene, seen, None
                with np.load(io.BytesIO(storage.read_bytes(frames)), allow_pickle=False) as file:
                    return scene, seen, Pair(scene.key, file["real"], file["made"], scene.prompt)
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile):  # of numpy, which advises to load it unsafely
                raise InputError(
                    f"{uri}*.npz: is damaged (not what was written); remove it, it is then measured again"
                ) from None
        frames_FHWC = scene.frames(self.bundle)
        made_FHWC = animate(self.bundle, self._request(scene, frames_FHWC)).frames_FHWC
        real_FHWC = as_given(frames_FHWC, self.bundle.recipe.data.size)
        pair = Pair(scene.key, real_FHWC, made_FHWC, scene.prompt)
        seen = Seen.of(pair, self.extractors, self.plan.first_frame)
        if show:
            content = io.BytesIO()
            np.savez_compressed(content, real=real_FHWC, made=made_FHWC)
            storage.write_bytes(frames, content.getvalue())
        storage.write_bytes(kept, seen.to_bytes())
        return scene, seen, pair if show else None

    def _request(self, scene: Scene, frames_FHWC: np.ndarray) -> AnimateRequest:
        wanted = {"steps": self.plan.steps, "seed": self._seed(scene), **scene.controls(self.bundle)}
        if len(frames_FHWC) > self.bundle.recipe.data.frames:
            wanted["frames"] = len(frames_FHWC)
        return AnimateRequest(frames_FHWC[0], scene.prompt, **wanted)

    def _seed(self, scene: Scene) -> int:
        """Of each scene another, or all videos would begin with the same noise. Small enough for a server's JSON."""
        return keyed_seed(self.plan.seed, scene.key) >> 31

    def picture(self, number: int) -> Picture:
        """The picture of a scene, with its prompt."""
        scene = self.scenes[number]
        return scene.key, scene.frames(self.bundle)[0], scene.prompt

    def moved(self, picture: Picture) -> np.ndarray | None:
        """Animate a picture at every value and seed, or read it: (values, seeds, 2) of 1 - SSIM and pixels a frame;
        None where the method has no control of motion."""
        if self.control is None:
            return None
        seeds = range(self.plan.seed, self.plan.seed + self.plan.seeds)
        return np.stack([self._moved(picture, self.control, seed) for seed in seeds], 1)

    def _moved(self, picture: Picture, control: tuple[str, tuple[float, ...]], seed: int) -> np.ndarray:
        """(values, 2); a part of its own for each seed, so that more seeds add to what is there."""
        (key, picture_HWC, prompt), (name, values), steps = picture, control, self.plan.steps
        sha = hashlib.sha256(picture_HWC.tobytes()).hexdigest()
        asked = _digest([self.bundle.digest, steps, seed, name, values, sha, prompt])
        uri = storage.join(self._parts, "motion", f"{key}-{asked}.json")
        if not storage.exists(uri):
            controls = [{name: value, "steps": steps, "seed": seed} for value in values]
            storage.write_json(uri, [_motion_of(self.bundle, picture_HWC, prompt, each) for each in controls])
        try:
            table = np.array(storage.read_json(uri), np.float64)
            if table.shape != (len(values), 2):
                raise ValueError(f"{table.shape}, expected {(len(values), 2)}")
        except ValueError as error:
            raise InputError(f"{uri}: is damaged ({error}); remove it, it is then measured again") from None
        return table

    @property
    def control(self) -> tuple[str, tuple[float, ...]] | None:
        """The control of how much moves, and the values that are measured."""
        known = method_class(self.bundle.recipe).controls_type.motion_values(self.bundle.recipe)
        return None if known is None else (known[0], levels(known[1], self.plan.values))

    def calibration(self, pictures: Sequence[Picture], say: Say) -> Calibration | None:
        """None where the method has no control of motion, or there are no pictures."""
        if self.control is None or not pictures:
            return None
        tables = []
        for number, picture in enumerate(
            counted("measuring the control of motion", pictures, len(pictures), "pictures")
        ):
            tables.append(self.moved(picture))
            say(f"{self.bundle.recipe.name}: motion control {number + 1}/{len(pictures)}: {picture[0]}")
        measured_PLS2 = np.array(tables, np.float64)
        return Calibration(*self.control, measured_PLS2[..., 0], measured_PLS2[..., 1])

    def pictures(self) -> Iterator[int]:
        """Numbers of the scenes whose pictures measure the control: spread over those that are measured."""
        yield from np.linspace(0, len(self.scenes) - 1, min(self.plan.pictures, len(self.scenes))).round().astype(int)

    def cost(self) -> tuple[int, float, float]:
        """Calls of the network for a video, its passes, and the seconds that one takes here; measured once."""
        uri = storage.join(self._videos, "work.json")
        if not storage.exists(uri):
            scene = self.scenes[0]
            request = self._request(scene, scene.frames(self.bundle))
            began = time.perf_counter()
            _, work = made(self.bundle, request)
            seconds = time.perf_counter() - began
            storage.write_json(uri, {"calls": work.calls, "passes": work.passes, "seconds": seconds})
        try:
            kept = storage.read_json(uri)
            return int(kept["calls"]), float(kept["passes"]), float(kept["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{uri}: is damaged ({error}); remove it, it is then measured again") from None

    def result(self, say: Say) -> Result:
        """Everything that the plan asks for."""
        bundle, plan, total = self.bundle, self.plan, len(self.scenes)
        measurements, rows, shown = Measurements(), [], []
        for number in counted(f"measuring {bundle.recipe.name}", range(total), total, "samples"):
            scene, seen, pair = self.scene(number)
            measurements.add(scene.key, seen, group_of_number(number))
            controls = scene.controls(bundle)
            rows.append({"clip": scene.name, **scene.facts, "seed": self._seed(scene), **controls, **seen.figures})
            if pair is not None:
                shown.append(Shown(scene.name, scene.prompt, _said(controls), pair.real_FHWC, pair.made_FHWC))
            say(f"{bundle.recipe.name}: sample {number + 1}/{total}: {scene.name}")
        pictures = [self.picture(number) for number in self.pictures()]
        with doing("measuring the time of a video"):
            calls, passes, seconds = self.cost()
        return Result(
            self.location,
            bundle.recipe.name,
            bundle.digest,
            plan.steps or bundle.recipe.sample.steps,
            self.scenes.frames(bundle),
            bundle.recipe.data.size,
            calls,
            passes,
            seconds,
            measurements.estimates(),
            rows,
            shown,
            self.calibration(pictures, say),
            self.identities,
            compare_noise(bundle, pictures, plan.steps, plan.seed) if plan.noise else {},
        )


def _motion_of(
    bundle: ModelBundle, picture_HWC: np.ndarray, prompt: str, controls: Mapping[str, Any]
) -> tuple[float, float]:
    """1 - SSIM and pixels a frame of what is generated."""
    frames_FHWC = animate(bundle, AnimateRequest(picture_HWC, prompt, **controls)).frames_FHWC
    return motion(frames_FHWC), flow_speed(frames_FHWC)


def _said(controls: Mapping[str, Any]) -> str:
    """``, motion bucket 3`` of controls, for people."""
    return "".join(f", {name.replace('_', ' ')} {value}" for name, value in controls.items())


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
