"""Every figure of generated videos beside the real ones they began from, streamed: frames are seen once and let go.

A `Seen` is what is kept of one video, a `Measurements` joins those of all, or of a worker's share: its figures do not
depend on how the work was cut.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cinemo.evaluation.calibration import Calibration
from cinemo.evaluation.extractors import Clip, Extractor, FeatureExtractor, PairwiseDistance
from cinemo.evaluation.metrics.distributions import LIMIT, Population
from cinemo.evaluation.metrics.estimates import Estimate, frechet, inception, kernel, mean_of
from cinemo.evaluation.metrics.frames import (
    dynamic_degree,
    first_frame_consistency,
    flicker_free,
    motion,
    psnr_of_frames,
    ssim_of_frames,
    still_psnr,
)
from cinemo.evaluation.metrics.similarity import (
    clip_similarity,
    frame_consistency,
    perceptual_input_conformity,
    temporal_consistency,
)
from cinemo.types import InputError


@dataclass(frozen=True)
class Metric:
    """``needs``: the extractor without which it stays empty. ``better``: which way."""

    name: str
    title: str
    needs: str | None
    better: Literal["higher", "lower", ""]


METRICS = (
    Metric("fvd", "FVD (Fréchet video distance, I3D)", "i3d", "lower"),
    Metric("kvd", "KVD (kernel video distance, I3D)", "i3d", "lower"),
    Metric("fid", "FID (Fréchet inception distance, all frames)", "inception", "lower"),
    Metric("is", "IS (inception score, C3D)", "c3d", "higher"),
    Metric("clipsim", "CLIPSIM (frames and prompt)", "clip", "higher"),
    Metric("f_consistency_4", "F-Consistency of the first 4 frames", "clip", "higher"),
    Metric("f_consistency", "F-Consistency of all frames", "clip", "higher"),
    Metric("tem_cons", "Tem-Cons (neighbouring frames)", "clip", "higher"),
    Metric("pic", "PIC (perceptual input conformity)", "dreamsim", "higher"),
    Metric("lpips", "LPIPS to the real continuation", "lpips", "lower"),
    Metric("psnr", "PSNR to the real continuation (dB)", None, "higher"),
    Metric("ssim", "SSIM to the real continuation", None, "higher"),
    Metric("latent_frechet", "Fréchet distance of latent statistics (bundle's autoencoder)", "latents", "lower"),
    Metric("first_frame_psnr", "first frame against the given picture (PSNR, dB)", None, "higher"),
    Metric("still_psnr", "what stands still in the clip, against the given picture (PSNR, dB)", None, "higher"),
    Metric("first_frame_consistency", "SSIM of later frames with the first one", None, ""),
    Metric("motion", "motion (1 - mean SSIM of neighbouring frames)", None, ""),
    Metric("motion_of_clip", "the same of the real clips", None, ""),
    Metric("dynamic_degree", "dynamic degree, graded (flow of the fastest 5%; 1: 6 pixels at a side of 256)", None, ""),
    Metric("temporal_flickering", "temporal flickering (VBench; 1 is none)", None, "higher"),
)
_KEEP_ROWS = ("i3d", "c3d")


@dataclass(frozen=True)
class Pair:
    """A generated video and the real clip that it began from, (F, H, W, 3) uint8 both; the first real frame is the
    given picture, and may be all there is of a clip. ``video``: an id."""

    video: str
    real_FHWC: np.ndarray
    made_FHWC: np.ndarray
    prompt: str

    @property
    def has_clip(self) -> bool:
        return len(self.real_FHWC) > 1


@dataclass(frozen=True)
class Seen:
    """What one pair of videos is counted by: figures by name, and by extractor the feature rows (real, generated), the
    first of them empty where there is no real clip."""

    figures: Mapping[str, float]
    features: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, pair: Pair, extractors: Mapping[str, Extractor], first_frame: bool = True) -> Seen:
        """
        Args:
            extractors: by name, those that there are.
            first_frame: whether what networks see begins with the first frame, which is given; figures against the
                real continuation never count it.
        """
        begin = 0 if first_frame else 1
        real_FHWC, made_FHWC = pair.real_FHWC[begin:], pair.made_FHWC[begin:]
        figures, features = _weightless(pair), {}
        for name, extractor in extractors.items():
            if isinstance(extractor, PairwiseDistance):
                figures |= _distances(extractor, pair, made_FHWC)
            elif isinstance(extractor, Clip):
                embeddings_FD = extractor.features(made_FHWC)
                figures |= {
                    "clipsim": clip_similarity(embeddings_FD, extractor.words(pair.prompt)),
                    "f_consistency_4": frame_consistency(embeddings_FD, 4),
                    "f_consistency": frame_consistency(embeddings_FD),
                    "tem_cons": temporal_consistency(embeddings_FD),
                }
            elif isinstance(extractor, FeatureExtractor):
                made = extractor.rows(made_FHWC)
                features[name] = extractor.rows(real_FHWC) if pair.has_clip else made[:0], made
                largest = max(float(np.abs(rows).max(initial=0.0)) for rows in features[name])
                if not largest < LIMIT:  # neither is what is not a number
                    raise InputError(
                        f"video {pair.video}: the largest feature of {name} is {largest}, expected finite ones below "
                        f"{LIMIT:g}; see what the network makes of it"
                    )
        return cls(figures, features)

    def to_bytes(self) -> bytes:
        """An npz file, from which `from_bytes` gives the same again."""
        arrays: dict[str, Any] = {f"figure.{name}": np.float64(value) for name, value in self.figures.items()}
        for name, (real, made) in self.features.items():
            arrays |= {f"real.{name}": real, f"made.{name}": made}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Seen:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            parts = [(*name.split(".", 1), file[name]) for name in file.files]
        real = {name: rows for kind, name, rows in parts if kind == "real"}
        made = {name: rows for kind, name, rows in parts if kind == "made"}
        figures = {name: float(value) for kind, name, value in parts if kind == "figure"}
        return cls(figures, {name: (rows, made[name]) for name, rows in real.items()})


class Measurements:
    """The figures of a set of videos."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}
        self.real: dict[str, Population] = {}
        self.made: dict[str, Population] = {}

    def add(self, video: str, seen: Seen, group: int | None = None) -> None:
        """Count one pair.

        Args:
            group: see `Population.add`.

        Raises:
            InputError: the id is there already; every pair has its own.
        """
        if any(video in values for values in self.figures.values()):
            raise InputError(f"video {video} is there twice; ids must differ")
        for name, value in seen.figures.items():
            self.figures.setdefault(name, {})[video] = value
        for name, rows in seen.features.items():
            for populations, each in zip((self.real, self.made), rows, strict=True):
                if not len(each):
                    continue
                if name not in populations:
                    populations[name] = Population(keep_rows=name in _KEEP_ROWS)
                populations[name].add(video, each, group)

    def __add__(self, other: Measurements) -> Measurements:
        joined = Measurements()
        for name in {**self.figures, **other.figures}:
            if both := self.figures.get(name, {}).keys() & other.figures.get(name, {}).keys():
                raise InputError(f"video {min(both)} is there twice; ids must differ")
            joined.figures[name] = self.figures.get(name, {}) | other.figures.get(name, {})
        joined.real, joined.made = _joined(self.real, other.real), _joined(self.made, other.made)
        return joined

    def estimates(self) -> dict[str, Estimate]:
        """By name, of `METRICS` those that there is something for.

        Distances by the networks of the papers (FVD, KVD, FID, IS) only with an interval and the value at N/2: without
        them they say nothing. In the groups of `group_of_number` that takes 6 videos.
        """
        found: dict[str, Estimate] = {}
        for metric in METRICS:
            if metric.name in self.figures:
                found[metric.name] = mean_of(self.figures[metric.name])
            elif metric.needs in self.made and len(self.made[metric.needs]) > 1:
                made, real = self.made[metric.needs], self.real.get(metric.needs)
                if metric.name == "is":
                    found["is"] = inception(made)
                elif real is not None:
                    found[metric.name] = (kernel if metric.name == "kvd" else frechet)(real, made)
                if metric.needs != "latents" and metric.name in found and found[metric.name].low is None:
                    del found[metric.name]
        return found


@dataclass(frozen=True)
class Shown:
    """A pair of videos for the page, (F, H, W, 3) uint8: the clip and what was generated from its first frame."""

    clip_id: str
    caption: str
    asked: str
    real_FHWC: np.ndarray
    made_FHWC: np.ndarray


@dataclass(frozen=True)
class Result:
    """What was measured of one bundle.

    ``size``: height and width of its videos. For a video:
    ``calls`` of its network, ``passes`` in them (guidance needs two for a step) and ``seconds`` of this machine.
    """

    location: str
    name: str
    digest: str
    steps: int
    frames: int
    size: tuple[int, int]
    calls: int
    passes: float
    seconds: float
    estimates: Mapping[str, Estimate]
    rows: Sequence[Mapping[str, Any]]
    shown: Sequence[Shown]
    calibration: Calibration | None
    extractors: Mapping[str, Mapping[str, str]]
    noise: Mapping[str, Mapping[str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        """The figures; a metric whose network has no weights is null."""
        known = self.estimates
        return {
            "bundle": self.digest,
            "recipe": self.name,
            "steps": self.steps,
            "calls_a_video": self.calls,
            "passes_a_video": self.passes,
            "seconds_a_video": self.seconds,
            "metrics": {each.name: known[each.name].to_json() if each.name in known else None for each in METRICS},
            "extractors": {name: dict(identity) for name, identity in self.extractors.items()},
            "initial_noise": {
                name: {figure: estimate.to_json() for figure, estimate in figures.items()}
                for name, figures in self.noise.items()
            },
            "motion_spearman": self.calibration.spearman if self.calibration else None,
            "obedience": self.calibration.obedience() if self.calibration else None,
        }


def _joined(a: Mapping[str, Population], b: Mapping[str, Population]) -> dict[str, Population]:
    return {name: a[name] + b[name] if name in a and name in b else a.get(name) or b[name] for name in {**a, **b}}


def _weightless(pair: Pair) -> dict[str, float]:
    """What frames alone tell."""
    real_FHWC, made_FHWC = pair.real_FHWC, pair.made_FHWC
    figures: dict[str, float | None] = {}
    if pair.has_clip:
        figures = {
            "psnr": float(psnr_of_frames(real_FHWC[1:], made_FHWC[1:]).mean()),
            "ssim": float(ssim_of_frames(real_FHWC[1:], made_FHWC[1:]).mean()),
            "still_psnr": still_psnr(real_FHWC, made_FHWC),
            "motion_of_clip": motion(real_FHWC),
        }
    figures |= {
        "first_frame_psnr": float(psnr_of_frames(real_FHWC[:1], made_FHWC[:1])[0]),
        "first_frame_consistency": first_frame_consistency(made_FHWC),
        "motion": motion(made_FHWC),
        "dynamic_degree": dynamic_degree(made_FHWC),
        "temporal_flickering": flicker_free(made_FHWC),
    }
    return {name: value for name, value in figures.items() if value is not None}


def _distances(extractor: PairwiseDistance, pair: Pair, made_FHWC: np.ndarray) -> dict[str, float]:
    if extractor.name == "lpips" and not pair.has_clip:
        return {}
    if extractor.name == "lpips":
        return {"lpips": float(extractor.distances(pair.real_FHWC[1:], pair.made_FHWC[1:]).mean())}
    given_FHWC = np.broadcast_to(pair.real_FHWC[:1], made_FHWC.shape)
    return {"pic": perceptual_input_conformity(extractor.distances(given_FHWC, made_FHWC))}
