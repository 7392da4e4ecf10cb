"""What a bundle is measured on: clips of a dataset, the pictures of a folder, or rendered ones."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from cinemo import storage
from cinemo.animate import load_image
from cinemo.bundle import ModelBundle
from cinemo.data.dataset.shards import DatasetIndex, Members, fetch_sample, record_uri
from cinemo.media.flow import dense_flow
from cinemo.media.synthetic import CLIP_FRAMES, render_scene
from cinemo.media.transforms import prepare_image
from cinemo.methods.controls import check_text
from cinemo.progress import counted
from cinemo.types import InputError, LatentSample

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DATASET = "dataset.json"
_READERS = 32  # pictures fetched at once
_RENDERED, _KINDS, _SIZE, _SEED = "rendered:", ("pan", "object", "flow", "zoom"), (64, 96), 7717


@dataclass(frozen=True)
class Scene:
    """A picture to animate, with the clip that it begins where there is one.

    Attributes:
        key: names it in files; unique among the scenes.
        name: for people.
        sample: its stored clip.
        picture: else what makes its picture when it is asked for, (H, W, 3) uint8.
    """

    key: str
    name: str
    prompt: str
    sample: LatentSample | None = None
    picture: Callable[[], np.ndarray] | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of its clip, for tables."""
        return {} if self.sample is None else {"frame_interval": self.sample.frame_interval}

    def controls(self, bundle: ModelBundle) -> dict[str, Any]:
        """What is asked for a video like the clip's own; without a clip the bundle's defaults.

        A method that knows a clip's flow is told that of the decoded clip: a dataset made for another method has none.
        """
        if self.sample is None:
            return {}
        sample, cells = self.sample, self.sample.latents_FCHW.shape[-2:]
        if "flow" in bundle.recipe.data.fields and "flow" not in sample.fields:
            fields = {**sample.fields, "flow": dense_flow(self.frames(bundle), cells)}
            sample = replace(sample, fields=fields)
        return bundle.method.controls_like(bundle.recipe, sample)

    def frames(self, bundle: ModelBundle) -> np.ndarray:
        """The clip, as its latents decode, or the picture alone: (F, H, W, 3) or (1, H, W, 3) uint8, of any size."""
        if self.picture is not None:
            return self.picture()[None]
        assert self.sample is not None
        return bundle.decoder.decode(torch.from_numpy(np.array(self.sample.latents_FCHW, np.float32)))


class Scenes(Sequence[Scene]):
    """Up to ``limit`` scenes at equal distances over all that a place has, each fetched when it is asked for.

    ``dataset``: that they are from, or None.
    """

    dataset: DatasetIndex | None = None

    def __init__(self, uri: str, total: int, limit: int) -> None:
        self.uri = uri
        self._places = np.linspace(0, total - 1, min(limit, total)).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return self.at(self._places[number])

    @property
    def location(self) -> str:
        """What `open_scenes` takes in a process with another working directory."""
        return storage.absolute(self.uri)

    @abstractmethod
    def at(self, place: int) -> Scene: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells scenes from those of another place that have the same keys; a picture's key does so by itself."""

    def frames(self, bundle: ModelBundle) -> int:
        """Of the videos that are generated: as many as the clips have."""
        return bundle.recipe.data.frames

    def check(self, bundle: ModelBundle) -> None:
        """
        Raises:
            InputError: the bundle makes videos of another shape.
        """

    def faults(self) -> list[str]:
        """What is wrong with scenes that cannot be animated, found before hours are spent on the others."""
        return []


class DatasetScenes(Scenes):
    """Samples of a dataset, spread over all of its shards; of one with several shapes, those of the recipe's own."""

    def __init__(self, uri: str, limit: int) -> None:
        index = DatasetIndex.load(uri)
        if len(index.latent_shapes) > 1:  # those of the shape that its recipe makes
            index = index.of_shape(index.info["latent_shape"])
        self.dataset = self._index = index
        self._ends = np.cumsum(self._index.samples_of_shards)
        super().__init__(uri, int(self._ends[-1]), limit)

    def at(self, place: int) -> Scene:
        number = int(np.searchsorted(self._ends, place, side="right"))
        shard = self._index.shards[number]
        members = Members(**storage.read_json(record_uri(self._index.uri, shard))["members"])
        begin = int(self._ends[number - 1]) if number else 0
        sample = fetch_sample(self._index.uri, shard, members, place - begin)
        return Scene(sample.key, sample.clip_id, sample.caption, sample)

    @property
    def fingerprint(self) -> str:
        return str(self._index.info["fingerprint"])

    def frames(self, bundle: ModelBundle) -> int:
        return len(self[0].sample.latents_FCHW)

    def check(self, bundle: ModelBundle) -> None:
        height, width = (side // bundle.vae.downscale for side in bundle.recipe.data.size)
        expected = (bundle.recipe.data.frames, bundle.vae.latent_channels, height, width)
        got = self[0].sample.latents_FCHW.shape
        makes_longer = "frames" in bundle.method.controls_type.model_fields
        if got[1:] != expected[1:] or got[0] < expected[0] or (got[0] > expected[0] and not makes_longer):
            raise InputError(
                f"--data {self.uri}: its latents are {got}, bundle {bundle.recipe.name} makes {expected} "
                f"(frames{' or more' * makes_longer}, channels, rows, columns); give a dataset made with that recipe"
            )


class PictureScenes(Scenes):
    """The pictures of a folder, by name.

    The prompt of ``boat.png`` is in ``boat.txt`` beside it. Without one it is the name, as VBench's image-to-video
    pictures (arXiv 2411.13503) are named by their prompts.
    """

    def __init__(self, uri: str, limit: int) -> None:
        names = set(storage.names(uri))
        self._names = sorted(name for name in names if name.lower().endswith(SUFFIXES))
        self._texts = names
        if not self._names:
            raise InputError(
                f"--data {uri}: holds neither a dataset ({_DATASET}) nor pictures ({', '.join(SUFFIXES)}); give what "
                "pipelines/precompute.py wrote, or a folder of pictures"
            )
        super().__init__(uri, len(self._names), limit)

    def at(self, place: int) -> Scene:
        name = self._names[place]
        stem = PurePosixPath(name).stem
        text, prompt = f"{stem}.txt", stem.replace("_", " ")
        if text in self._texts:
            try:
                prompt = storage.read_bytes(storage.join(self.uri, text)).decode().strip()
            except UnicodeDecodeError:
                raise InputError(f"{storage.join(self.uri, text)}: is no UTF-8 text, expected a prompt") from None
        uri = storage.join(self.uri, name)
        content = hashlib.sha256(storage.read_bytes(uri) + prompt.encode()).hexdigest()
        return Scene(f"picture-{place:06d}-{content[:16]}", name, prompt, picture=partial(load_image, uri))

    @property
    def fingerprint(self) -> str:
        return "pictures"

    def faults(self) -> list[str]:
        with ThreadPoolExecutor(_READERS if storage.is_remote(self.uri) else 1) as pool:
            tried = counted("trying the pictures", pool.map(self._fault, range(len(self))), len(self), "pictures")
            return [fault for fault in tried if fault is not None]

    def _fault(self, number: int) -> str | None:
        try:
            scene = self[number]
            check_text(f"prompt of {storage.join(self.uri, scene.name)}", scene.prompt)
            scene.picture()
        except InputError as error:
            return str(error)
        return None


class RenderedScenes(Scenes):
    """Rendered pictures that no training has seen, of each kind in turn, with prompts that leave the speed to the
    control of motion: ``rendered:64`` is what the cards of the shipped models speak of."""

    def __init__(self, uri: str, limit: int) -> None:
        count = uri.removeprefix(_RENDERED)
        if not re.fullmatch(r"[1-9][0-9]{0,5}", count):
            raise InputError(f"--data {uri}: expected a number of pictures, 1 to 999999, such as {_RENDERED}64")
        super().__init__(uri, int(count), limit)

    @property
    def location(self) -> str:
        return self.uri

    def at(self, place: int) -> Scene:
        kind, index = _KINDS[place % len(_KINDS)], place // len(_KINDS)
        scene = render_scene(_SEED, index, _SIZE, kind=kind)
        name = f"{kind}-{index:02d}"
        return Scene(f"rendered-{name}", name, scene.without_speed(), picture=partial(scene.draw, CLIP_FRAMES / 2))

    @property
    def fingerprint(self) -> str:
        return f"rendered-{_SEED}"


def open_scenes(uri: str, limit: int) -> Scenes:
    """Up to ``limit`` scenes of a dataset, of a folder of pictures, or of rendered ones (``rendered:64``).

    Raises:
        InputError: it is not there, or damaged.
    """
    if uri.startswith(_RENDERED):
        return RenderedScenes(uri, limit)
    is_dataset = storage.exists(storage.join(uri, _DATASET))
    return DatasetScenes(uri, limit) if is_dataset or not storage.names(uri) else PictureScenes(uri, limit)


def as_given(frames_FHWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(F, H, W, 3) uint8 of any size as a model sees them: resized and cut out of the centre like its picture, so that
    they and what is generated show the same part."""
    pictures = [prepare_image(frame_HWC, size).permute(1, 2, 0).numpy() for frame_HWC in frames_FHWC]
    return ((np.stack(pictures) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
