"""Which choices of a protocol move a distance between sets of videos, and by how much.

The same model stands at an FVD of 429.23 in its own paper and of 404.50 in another: papers differ in what they hardly
mention. Here two sets of videos stay as they are and one choice at a time is changed. Both are rendered, so that it
takes minutes: real clips, and those of a pretended model that begins with their first frames, shows them a little soft
and moves at `PACE` of their speed.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np

from cinemo import storage
from cinemo.bundle import load_bundle
from cinemo.evaluation.extractors import FeatureExtractor, LatentStatistics, load_extractors
from cinemo.evaluation.figures import knob_bars
from cinemo.evaluation.metrics.distributions import Population, group_of_number
from cinemo.evaluation.metrics.estimates import Estimate, frechet
from cinemo.evaluation.page import chart, number, section, table, write_page
from cinemo.evaluation.scenes import as_given
from cinemo.media.synthetic import CLIP_FRAMES, render_scene
from cinemo.media.transforms import cover_crop_geometry
from cinemo.progress import counted, say
from cinemo.types import InputError

SEED = 9001  # of the scenes; no training has seen them
PACE = 0.6
SOFTNESS = 0.5  # pixels, the deviation of the blur
LARGER = 2  # how much larger than the model's videos the sources are
STRIDE = 3

Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def _by(interpolation: int) -> Resize:
    """Another interpolation, of the same part of the picture as `as_given` shows."""

    def resized(frames_FHWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        crop = cover_crop_geometry(frames_FHWC.shape[1], frames_FHWC.shape[2], size)
        (height, width), top, left = crop.resized_hw, crop.top, crop.left
        whole = np.stack([cv2.resize(frame, (width, height), interpolation=interpolation) for frame in frames_FHWC])
        return whole[:, top : top + size[0], left : left + size[1]]

    return resized


def _squeezed(frames_FHWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A square cut out of the centre, made as wide as the model's videos: another aspect ratio."""
    height, width = frames_FHWC.shape[1:3]
    left = (width - height) // 2
    square_FHWC = frames_FHWC[:, :, left : left + height]
    return np.stack([cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA) for frame in square_FHWC])


RESIZES: Mapping[str, tuple[str, Resize]] = {
    "published": ("bilinear without antialiasing, as the models were trained", as_given),
    "area": ("mean over the area (antialiased)", _by(cv2.INTER_AREA)),
    "cubic": ("bicubic without antialiasing", _by(cv2.INTER_CUBIC)),
    "nearest": ("nearest pixel", _by(cv2.INTER_NEAREST)),
    "square": ("a square from the centre, squeezed", _squeezed),
}


@dataclass(frozen=True)
class Knobs:
    """One way to measure.

    Attributes:
        stride: frames of the source from one to the next, of both sets.
        real_stride: of the real clips alone, where it is another.
        resize: of the real clips, among `RESIZES`; a model's videos come in their own size.
        first_frame: whether the first frame counts, which both share.
        share: of the videos.
    """

    stride: int = STRIDE
    real_stride: int | None = None
    resize: str = "published"
    first_frame: bool = True
    share: float = 1.0


def turned(videos: int) -> dict[str, Knobs]:
    """The usual way to measure, and those that differ from it in one choice, by what they change."""
    usual = Knobs()
    ways = {f"as usual: {videos} videos, stride {STRIDE}, {RESIZES['published'][0]}, all frames": usual}
    for stride in (1, 6):
        ways[f"frame stride {stride} of both sets"] = replace(usual, stride=stride)
    for stride in (1, 6):
        ways[f"frame stride {stride} of real clips alone"] = replace(usual, real_stride=stride)
    for name in list(RESIZES)[1:]:
        ways[f"real clips resized by: {RESIZES[name][0]}"] = replace(usual, resize=name)
    for part in (2, 4, 8):
        ways[f"{videos // part} videos"] = replace(usual, share=1 / part)
    ways["without the first frame"] = replace(usual, first_frame=False)
    return ways


class KnobMeter:
    """Measures distances between real and pretended videos, and keeps their features for the next.

    Args:
        size, frames: of the model's videos.
    """

    def __init__(
        self, extractor: FeatureExtractor, videos: int, size: tuple[int, int], frames: int, seed: int = SEED
    ) -> None:
        least = 8 * 2
        if videos < least:
            raise InputError(f"--knobs is {videos}, expected at least {least} videos: an eighth of them is a set, too")
        self._extractor, self._videos, self._size, self._frames, self._seed = extractor, videos, size, frames, seed
        self._rows: dict[tuple[Any, ...], np.ndarray] = {}

    def __call__(self, knobs: Knobs) -> Estimate:
        real, made = Population(), Population()
        for place in range(round(self._videos * knobs.share)):
            video, group = f"{place:06d}", group_of_number(place)
            real.add(
                video, self._features(place, knobs.real_stride or knobs.stride, knobs.resize, knobs.first_frame), group
            )
            made.add(video, self._features(place, knobs.stride, "", knobs.first_frame), group)
        return frechet(real, made)

    def _features(self, place: int, stride: int, resize: str, first_frame: bool) -> np.ndarray:
        """Of a real clip ``resize``-d, or of the pretended model's video where that is empty."""
        key = (place, stride, resize, first_frame)
        if key not in self._rows:
            height, width = self._size
            scene = render_scene(self._seed, place, (LARGER * height, LARGER * width))
            start = (CLIP_FRAMES - 1 - stride * (self._frames - 1)) // 2
            if start < 0:
                raise InputError(f"{self._frames} frames {stride} apart are more than a rendered clip's {CLIP_FRAMES}")
            pace = stride if resize else stride * PACE
            frames_FHWC = scene.frames(start + pace * k for k in range(self._frames))
            if resize:
                seen_FHWC = RESIZES[resize][1](frames_FHWC, self._size)
            else:
                given_FHWC = as_given(frames_FHWC, self._size)
                seen_FHWC = np.stack([cv2.GaussianBlur(frame, (0, 0), SOFTNESS) for frame in given_FHWC])
                seen_FHWC[0] = given_FHWC[0]
            self._rows[key] = self._extractor.rows(seen_FHWC if first_frame else seen_FHWC[1:])
        return self._rows[key]


def write_knobs(
    bundle_location: str,
    output: str,
    videos: int,
    extractors: tuple[str, ...] = (),
    device: str | None = None,
    say: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Write ``knobs.json`` and ``knobs.html`` under ``output``; returns the figures, by extractor and way.

    Args:
        videos: rendered clips in each set.
        extractors: ``NAME=PLACE`` of networks that see videos or frames; the bundle's autoencoder is always among them.

    Raises:
        InputError: no bundle there, an extractor of another kind, or too few videos.
    """
    storage.check_writable(output)
    bundle = load_bundle(bundle_location, device)
    loaded = {"latents": LatentStatistics(bundle.vae, bundle.digest)} | load_extractors(extractors, bundle.device)
    figures: dict[str, dict[str, Estimate]] = {}
    for name, extractor in loaded.items():
        if not isinstance(extractor, FeatureExtractor) or name == "clip":
            raise InputError(f"--extractor {name}: gives no features of a set; --knobs takes i3d, inception and c3d")
        meter = KnobMeter(extractor, videos, bundle.recipe.data.size, bundle.recipe.data.frames)
        figures[name] = {}
        ways = turned(videos)
        for done, (text, knobs) in enumerate(counted(f"measuring by {name}", ways.items(), len(ways), "ways"), 1):
            figures[name][text] = meter(knobs)
            say(f"{name}: {done}/{len(ways)} {text}: {figures[name][text].value:.4g}")
    found = {
        "about": {"bundle": bundle.digest, "videos": videos, "seed": SEED, "pace": PACE, "softness": SOFTNESS},
        "ways": {text: asdict(knobs) for text, knobs in turned(videos).items()},
        "distances": {name: {text: each.to_json() for text, each in row.items()} for name, row in figures.items()},
    }
    storage.write_json(storage.join(output, "knobs.json"), found)
    identities = {name: extractor.identity["extractor"] for name, extractor in loaded.items()}
    _write_page(storage.join(output, "knobs.html"), figures, identities)
    return found


def _write_page(uri: str, figures: Mapping[str, Mapping[str, Estimate]], identities: Mapping[str, str]) -> None:
    body = [
        "<h1>What moves a distance between sets of videos</h1>",
        f'<p class="lead">{html.escape(_LEAD)}</p>',
    ]
    for name, ways in figures.items():
        usual = next(iter(ways.values())).value
        rows = [
            [
                html.escape(text),
                number(each.value),
                "-" if each.low is None or each.high is None else f"{number(each.low)} to {number(each.high)}",
                f"{each.value / usual:.2f}" if usual else "-",
                "-" if each.extrapolated is None else number(each.extrapolated),
            ]
            for text, each in ways.items()
        ]
        body += [
            section(f"Fréchet distance of {identities[name]}", "One choice at a time; everything else as usual."),
            chart(knob_bars({text: each.value for text, each in ways.items()}), "The distance; the line is as usual."),
            table(["what is changed", "distance", "95% interval", "of the usual", "at infinitely many videos"], rows),
        ]
    write_page(uri, "What moves a distance between sets of videos", body)


_LEAD = (
    "Real clips and a pretended model's videos, both rendered: the model begins with the clip's first frame, is a "
    f"little soft and moves at {PACE:g} of the speed. It is the same model in every row. What changes is how it is "
    "measured, so figures of two papers compare only where their protocols agree."
)
