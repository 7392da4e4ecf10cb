"""Long videos by every way there is (`cinemo.methods.long`, `cinemo.diffusion.phased`): do they show their seams?

The same pictures, prompts and seeds, as `LongConfig` can be set. A seam is where a part or window begins.
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.diffusion.phased import overlap_of, window_starts
from cinemo.evaluation.metrics.estimates import Estimate, mean_of
from cinemo.evaluation.metrics.frames import colour_drift, largest_jump, motion, ssim
from cinemo.evaluation.page import mp4_bytes, number, section, table, video, write_page
from cinemo.media.synthetic import CLIP_FRAMES, render_scene
from cinemo.methods import method_class
from cinemo.networks.frozen import ImageEncoder
from cinemo.progress import counted, say
from cinemo.types import InputError

SEED = 7_003  # of scenes that no training has seen
_STAND_IN = "package:tiny/image_encoder"
_BATCH = 16  # frames that the image encoder sees at once
_SHOWN = 3  # pictures whose videos are on the page

WAYS: dict[str, dict[str, Any]] = {
    "phased": {"way": "phased"},
    "phased, frames shuffled within segments": {"way": "phased", "shuffle": "segment"},
    "phased, noise of the standing picture": {"way": "phased", "noise": "image"},
    "phased, half of the steps shared": {"way": "phased", "gamma": 0.5},
    "windows that share 4 frames": {"way": "windows", "overlap": 4},
    "windows that share half": {"way": "windows", "overlap": 8},
    "chain": {"way": "chain"},
}

FIGURES = {
    "seam_ratio": "change from frame to frame at seams, over that elsewhere: 1 is no seam",
    "seam_ssim_gap": "SSIM of neighbouring frames elsewhere minus that at seams",
    "tem_cons": "Tem-Cons within parts: mean cosine of what an image encoder makes of neighbouring frames",
    "tem_cons_gap": "that elsewhere minus that at seams",
    "largest_jump": "largest change from frame to frame, over the mean change",
    "motion": "motion (1 - mean SSIM of neighbouring frames)",
    "colour_drift": "mean colour of the last frame against the first (levels of 255)",
}


@dataclass(frozen=True)
class Way:
    """``figures``: of `FIGURES`. ``calls``: of the network, ``seconds``: of all, both for one video."""

    figures: Mapping[str, Estimate]
    calls: int
    seconds: float
    shown: Sequence[np.ndarray]


def seams(way: Mapping[str, Any], frames: int, length: int, diffused: int) -> list[int]:
    """Frames that begin a part: the change to each from the one before is at a seam.

    Args:
        way: as `WAYS` has it.
        length, diffused: frames of a video that the network makes at once, and those that are diffused of them.
    """
    given = length - diffused  # Cinemo's first frame
    if way["way"] == "chain":
        return list(range(length, frames, length - 1))
    if way["way"] == "windows":
        overlap = overlap_of(way["overlap"], diffused)
        return [given + start for start in window_starts(frames - given, diffused, overlap)[1:]]
    return list(range(length, frames, diffused))


def seam_figures(frames_FHWC: np.ndarray, at: Sequence[int], embeddings_FD: Tensor) -> dict[str, float]:
    """`FIGURES` of one video whose seams are ``at`` these frames, with an image encoder's embedding of each frame."""
    steps = np.array([np.abs(np.float64(b) - a).mean() for a, b in itertools.pairwise(frames_FHWC)])
    alike = np.array([ssim(a, b) for a, b in itertools.pairwise(frames_FHWC)])
    cosines = F.cosine_similarity(embeddings_FD[1:].double(), embeddings_FD[:-1].double(), dim=1).cpu().numpy()
    seam = np.zeros(len(steps), bool)
    seam[np.array(at) - 1] = True
    return {
        "seam_ratio": float(steps[seam].mean() / max(1e-9, steps[~seam].mean())),
        "seam_ssim_gap": float(alike[~seam].mean() - alike[seam].mean()),
        "tem_cons": float(cosines[~seam].mean()),
        "tem_cons_gap": float(cosines[~seam].mean() - cosines[seam].mean()),
        "largest_jump": largest_jump(frames_FHWC),
        "motion": motion(frames_FHWC),
        "colour_drift": colour_drift(frames_FHWC),
    }


def write_long(
    bundle_location: str,
    output: str,
    frames: int,
    pictures: int = 4,
    steps: int | None = None,
    device: str | None = None,
    say: Callable[[str], None] = say,
) -> dict[str, Way]:
    """Write ``long.json`` and ``long.html`` under ``output``; returns what was measured, by way.

    Args:
        frames: of each video, more than the network makes at once.
        pictures: rendered scenes that no training has seen.

    Raises:
        InputError: no bundle there, its method makes no long videos, or too few frames or pictures.
    """
    storage.check_writable(output)
    bundle = load_bundle(bundle_location, device)
    data = bundle.recipe.data
    if "frames" not in method_class(bundle.recipe).controls_type.model_fields:
        raise InputError(f"--long: {bundle.recipe.name} makes {data.frames} frames and no more")
    if frames <= data.frames or pictures < 1:
        raise InputError(
            f"--long {frames} --limit {pictures}: expected more than {data.frames} frames, which {bundle.recipe.name} "
            "makes at once, of at least one picture"
        )
    kinds = ("pan", "object", "flow", "zoom")
    scenes = [render_scene(SEED, place, data.size, kind=kinds[place % len(kinds)]) for place in range(pictures)]
    asked = [(scene.frames([CLIP_FRAMES // 2])[0], scene.without_speed()) for scene in scenes]
    measured: dict[str, Way] = {}
    place = _encoder_place(bundle)
    encoder = bundle.image or ImageEncoder(place, next(bundle.method.parameters()).device)
    for name, way in WAYS.items():
        key = _digest([bundle.digest, way, frames, steps, SEED, str(place)])
        parts = storage.join(output, "parts", f"long-{key}")
        measured[name] = _measure(_with(bundle, way), way, asked, frames, steps, encoder, parts)
        figures = measured[name].figures
        say(f"{name}: " + ", ".join(f"{figure} {each.value:.3g}" for figure, each in figures.items()))
    shown = {
        name: {
            "set": WAYS[name],
            "calls": way.calls,
            "seconds": way.seconds,
            "figures": {figure: each.to_json() for figure, each in way.figures.items()},
        }
        for name, way in measured.items()
    }
    about = {"bundle": bundle.digest, "recipe": bundle.recipe.name, "frames": frames, "pictures": pictures}
    about["image_encoder"] = place
    storage.write_json(storage.join(output, "long.json"), {"about": about | {"seed": SEED}, "ways": shown})
    _write_page(storage.join(output, "long.html"), bundle, frames, [prompt for _, prompt in asked], measured)
    return measured


def _encoder_place(bundle: ModelBundle) -> str:
    """Of Tem-Cons: the bundle's own image encoder, or the small one that ships, which is not CLIP."""
    return "the bundle's" if bundle.image is not None else _STAND_IN


def _class_tokens(encoder: ImageEncoder, frames_FHWC: np.ndarray) -> Tensor:
    """(F, D): the first of an image encoder's tokens of each frame."""
    pieces = [
        encoder.encode(list(frames_FHWC[start : start + _BATCH]))[:, 0] for start in range(0, len(frames_FHWC), _BATCH)
    ]
    return torch.cat(pieces).float()


def _with(bundle: ModelBundle, way: Mapping[str, Any]) -> ModelBundle:
    """A bundle whose long videos come about in another way, around the same networks."""
    sample = bundle.recipe.sample
    sample = sample.model_copy(update={"long": sample.long.model_copy(update=dict(way))})
    recipe = bundle.recipe.model_copy(update={"sample": sample})
    return replace(bundle, recipe=recipe, method=type(bundle.method).of(recipe, bundle.method.networks))


def _measure(
    bundle: ModelBundle,
    way: Mapping[str, Any],
    asked: Sequence[tuple[np.ndarray, str]],
    frames: int,
    steps: int | None,
    encoder: ImageEncoder,
    parts: str,
) -> Way:
    """One way on every picture; what was measured of each is kept under names that begin with ``parts``."""
    length, (height, width) = bundle.recipe.data.frames, bundle.recipe.data.size
    _, diffused, _, _ = bundle.method.target_shape((1, length, height, width))
    at, videos = seams(way, frames, length, diffused), list[_Measured]()
    what = f"animating by {way['way']}"
    for place, (picture_HWC, prompt) in enumerate(counted(what, asked, len(asked), "videos")):
        uri = f"{parts}-{place}.npz"
        if not storage.exists(uri):
            request = AnimateRequest(picture_HWC, prompt, steps=steps, frames=frames)
            storage.write_bytes(uri, _animated(bundle, request, at, encoder, place < _SHOWN).to_bytes())
        videos.append(_Measured.read(uri))
    figures = {
        figure: mean_of({str(place): each.figures[figure] for place, each in enumerate(videos)}) for figure in FIGURES
    }
    shown = [each.frames_FHWC for each in videos[:_SHOWN]]
    return Way(figures, videos[-1].calls, float(np.mean([each.seconds for each in videos])), shown)


@dataclass(frozen=True)
class _Measured:
    """Of one video; ``frames_FHWC`` are none where it is not shown."""

    figures: Mapping[str, float]
    calls: int
    seconds: float
    frames_FHWC: np.ndarray

    def to_bytes(self) -> bytes:
        content = io.BytesIO()
        arrays: dict[str, Any] = {f"figure.{name}": value for name, value in self.figures.items()}
        arrays |= {"calls": self.calls, "seconds": self.seconds, "frames": self.frames_FHWC}
        np.savez_compressed(content, **arrays)
        return content.getvalue()

    @classmethod
    def read(cls, uri: str) -> _Measured:
        try:
            with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
                figures = {figure: float(file[f"figure.{figure}"]) for figure in FIGURES}
                return cls(figures, int(file["calls"]), float(file["seconds"]), file["frames"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{uri}: is damaged ({error}); remove it, it is then measured again") from None


def _animated(
    bundle: ModelBundle, request: AnimateRequest, at: Sequence[int], encoder: ImageEncoder, is_shown: bool
) -> _Measured:
    calls, begun = 0, time.perf_counter()

    def count(done: int, total: int) -> None:
        nonlocal calls
        calls = total

    made_FHWC = animate(bundle, request, count).frames_FHWC
    seconds = time.perf_counter() - begun
    figures = seam_figures(made_FHWC, at, _class_tokens(encoder, made_FHWC))
    return _Measured(figures, calls, seconds, made_FHWC if is_shown else made_FHWC[:0])


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _write_page(
    uri: str, bundle: ModelBundle, frames: int, prompts: Sequence[str], measured: Mapping[str, Way]
) -> None:
    fps = bundle.recipe.sample.fps
    header = ["way", *FIGURES, "calls", "seconds"]
    rows = [
        [
            html.escape(name),
            *(_with_interval(each) for each in way.figures.values()),
            str(way.calls),
            f"{way.seconds:.1f}",
        ]
        for name, way in measured.items()
    ]
    body = [
        f"<h1>{frames} frames of {html.escape(bundle.recipe.name)}</h1>",
        f'<p class="lead">The network makes {bundle.recipe.data.frames} at once. Means over {len(prompts)} rendered '
        "pictures, with 95% intervals; the same seeds for all ways. Tem-Cons is of the class token of "
        f"an image encoder: {html.escape(_encoder_place(bundle))}.</p>",
        table(header, rows),
        section(
            "What the columns say", "; ".join(f"{name.replace('_', ' ')}: {text}" for name, text in FIGURES.items())
        ),
    ]
    for place, prompt in enumerate(prompts[:_SHOWN]):
        body.append(section(prompt, "One seed, every way."))
        cells = (
            f"<figure>{video(mp4_bytes(way.shown[place], fps))}<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, way in measured.items()
        )
        body.append(f'<div class="pair">{"".join(cells)}</div>')
    write_page(uri, "Long videos", body)


def _with_interval(each: Estimate) -> str:
    if each.low is None or each.high is None:
        return number(each.value)
    return f"{number(each.value)} ({number(each.low)} to {number(each.high)})"
