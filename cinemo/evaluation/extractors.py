"""Networks that metrics are defined by, as plug-ins: each reads its weights from a local or s3:// place that is given.

None of them ships with the package. A metric whose network has no weights stays empty, and `MISSING` says what to put
where. What a figure was measured with is part of it: `Extractor.identity` is its name and the sha256 of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cinemo.networks.frozen import Vae
from cinemo.networks.weights import read_config, resolve, weights_digest
from cinemo.types import InputError

_FRAMES_AT_ONCE = 16


class Extractor(ABC):
    """A network's view of videos.

    Attributes:
        name: as in ``--extractor NAME=PLACE``.
        expects: what its weights are, for people.
    """

    name: ClassVar[str]
    expects: ClassVar[str]

    def __init__(self, location: str, device: torch.device | str = "cpu") -> None:
        self.location, self.device = location, torch.device(device)
        self.identity = {"extractor": self.name, "weights": weights_digest(location)[:12]}


class FeatureExtractor(Extractor):
    """One that makes feature rows of a video. ``width``: of the network that its metrics are defined by."""

    width: ClassVar[int | None] = None

    def rows(self, frames_FHWC: np.ndarray) -> np.ndarray:
        """`features`, checked: another network's are not called by the name of this one's metrics.

        Raises:
            InputError: of another width.
        """
        rows = self.features(frames_FHWC)
        if self.width is not None and (rows.ndim != 2 or rows.shape[1] != self.width):
            raise InputError(
                f"--extractor {self.name}={self.location}: answers with {rows.shape}, expected (rows, {self.width}): "
                f"{self.expects}"
            )
        return rows

    @abstractmethod
    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        """(rows, D) float32 of a video (uint8 RGB): one row, or one for each frame."""


class _TorchScript(Extractor):
    """Weights with their own code, as these networks are handed around."""

    def __init__(self, location: str, device: torch.device | str = "cpu") -> None:
        path = resolve(location)
        try:
            self.network: Any = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            raise InputError(
                f"--extractor {self.name}={location}: is not TorchScript ({str(error).splitlines()[0][:120]}); "
                f"expected {self.expects}"
            ) from None
        super().__init__(location, device)

    @torch.inference_mode()
    def _ask(self, *given: Any, **flags: bool) -> np.ndarray:
        try:
            answer: Tensor = self.network(*given, **flags)
            return answer.float().cpu().numpy()
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"--extractor {self.name}={self.location}: refuses its input "
                f"({str(error).strip().splitlines()[-1][:160]}); expected {self.expects}"
            ) from None


class I3D(_TorchScript, FeatureExtractor):
    """Of FVD (arXiv 1812.01717) and KVD: the layer before the classes of an I3D that knows Kinetics-400."""

    name, width = "i3d", 400
    expects = (
        "I3D of Kinetics-400 as TorchScript, the one that StyleGAN-V's metrics use: called with (B, 3, F, H, W) levels "
        "0..255 and rescale, resize and return_features, it returns (B, 400)"
    )

    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        video_BCFHW = _channels_first(frames_FHWC).transpose(0, 1)[None].to(self.device)
        return self._ask(video_BCFHW, rescale=True, resize=True, return_features=True)


class Inception(_TorchScript, FeatureExtractor):
    """Of FID (arXiv 1706.08500), frame by frame."""

    name, width = "inception", 2048
    expects = (
        "Inception-v3 of the original FID as TorchScript, the one that StyleGAN3's metrics use: called with uint8 "
        "(B, 3, H, W) and return_features, it returns (B, 2048)"
    )

    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        frames = torch.from_numpy(np.ascontiguousarray(frames_FHWC)).permute(0, 3, 1, 2)
        parts = [self._ask(part.to(self.device), return_features=True) for part in torch.split(frames, _FRAMES_AT_ONCE)]
        return np.concatenate(parts)


class C3D(_TorchScript, FeatureExtractor):
    """Of the Inception score on UCF-101: classes of a video."""

    name, width = "c3d", 101
    expects = "C3D of UCF-101 as TorchScript: called with (B, 3, F, H, W) levels 0..255, it returns (B, 101) logits"

    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        return self._ask(_channels_first(frames_FHWC).transpose(0, 1)[None].to(self.device))


class Clip(FeatureExtractor):
    """Of CLIPSIM, F-Consistency and Tem-Cons: embeddings of frames and words in one space."""

    name = "clip"
    expects = "a folder of transformers' CLIPModel with its tokenizer and preprocessor_config.json"

    def __init__(self, location: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        path = resolve(location)
        if read_config(path, location).get("model_type") != "clip":
            raise InputError(f"--extractor clip={location}: is no CLIPModel, expected {self.expects}")
        try:
            self.network: Any = CLIPModel.from_pretrained(path).to(device).eval()
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(path)
            self.processor: Any = CLIPImageProcessor.from_pretrained(path)
        except Exception as error:  # safetensors' and torch's own among them
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
            raise InputError(f"--extractor clip={location}: {reason}; expected {self.expects}") from None
        super().__init__(location, device)
        vision = self.network.config.vision_config
        self.identity["backbone"] = f"{vision.hidden_size} wide, patches of {vision.patch_size}"

    @torch.inference_mode()
    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        made = []
        for part in np.array_split(frames_FHWC, -(-len(frames_FHWC) // _FRAMES_AT_ONCE)):
            pixels = self.processor(list(part), return_tensors="pt").pixel_values.to(self.device)
            hidden = self.network.vision_model(pixels).pooler_output
            made.append(self.network.visual_projection(hidden).float().cpu().numpy())
        return np.concatenate(made)

    @torch.inference_mode()
    def words(self, text: str) -> np.ndarray:
        """(D,) of a prompt."""
        tokens = self.tokenizer([text], truncation=True, return_tensors="pt").to(self.device)
        hidden = self.network.text_model(**tokens).pooler_output
        embedding: Tensor = self.network.text_projection(hidden)
        return embedding[0].float().cpu().numpy()


class PairwiseDistance(_TorchScript):
    """A distance of pictures, learnt from people."""

    side: ClassVar[int | None] = None
    low: ClassVar[float]  # level of black; white is 1

    def distances(self, a_FHWC: np.ndarray, b_FHWC: np.ndarray) -> np.ndarray:
        """(F,) of each frame to its counterpart, uint8."""
        parts = []
        for start in range(0, len(a_FHWC), _FRAMES_AT_ONCE):
            pair = [self._prepared(frames[start : start + _FRAMES_AT_ONCE]) for frames in (a_FHWC, b_FHWC)]
            parts.append(self._ask(*pair).reshape(-1))
        return np.concatenate(parts)

    def _prepared(self, frames_FHWC: np.ndarray) -> Tensor:
        levels = _channels_first(frames_FHWC).to(self.device) / 255 * (1 - self.low) + self.low
        if self.side is None:
            return levels
        return functional.interpolate(levels, (self.side, self.side), mode="bicubic", antialias=True).clamp(self.low, 1)


class Lpips(PairwiseDistance):
    """LPIPS (arXiv 1801.03924), of AlexNet."""

    name, low = "lpips", -1.0
    expects = "LPIPS of AlexNet as TorchScript: called with two (B, 3, H, W) in -1..1, it returns B distances"


class DreamSim(PairwiseDistance):
    """DreamSim (arXiv 2306.09344), of PIC."""

    name, low, side = "dreamsim", 0.0, 224
    expects = "DreamSim's ensemble as TorchScript: called with two (B, 3, 224, 224) in 0..1, it returns B distances"


class LatentStatistics(FeatureExtractor):
    """What needs no weights but the bundle's own autoencoder: statistics of a video's latents.

    Of each of C channels its mean, its deviation, and the deviation of what changes from frame to frame: one row of 3 C
    numbers. Distances in it compare videos of one autoencoder; they are no FVD and are not called one.
    """

    name = "latents"
    expects = "nothing: it is the bundle's own autoencoder"

    def __init__(self, vae: Vae, digest: str) -> None:
        self.vae = vae
        self.identity = {"extractor": "latent statistics (bundle's autoencoder)", "weights": digest[:12]}

    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(frames_FHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents_FCHW = self.vae.encode(pixels).double().cpu()
        changes = latents_FCHW.diff(dim=0)
        parts = (latents_FCHW.mean((0, 2, 3)), latents_FCHW.std((0, 2, 3)), changes.square().mean((0, 2, 3)).sqrt())
        return torch.cat(parts)[None].numpy()


EXTRACTORS: Mapping[str, type[Extractor]] = {kind.name: kind for kind in (I3D, Inception, C3D, Clip, Lpips, DreamSim)}


def load_extractors(assignments: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Extractor]:
    """Of ``NAME=PLACE`` words.

    Raises:
        InputError: a name that is not in `EXTRACTORS`, or weights that are not what it expects.
    """
    loaded: dict[str, Extractor] = {}
    for word in assignments:
        name, found, place = word.partition("=")
        if not found or not place or name not in EXTRACTORS:
            raise InputError(f"--extractor {word!r}: expected NAME=PLACE with one of {', '.join(EXTRACTORS)}")
        if name in loaded:
            raise InputError(f"--extractor {word!r}: {name} is {loaded[name].location} already, expected it once")
        loaded[name] = EXTRACTORS[name](place, device)
    return loaded


def _channels_first(frames_FHWC: np.ndarray) -> Tensor:
    """(F, 3, H, W) levels 0..255, float32."""
    return torch.from_numpy(np.ascontiguousarray(frames_FHWC)).permute(0, 3, 1, 2).float()
