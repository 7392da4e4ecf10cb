"""Extractors with stand-ins for the networks that they expect, called as those are; and weights that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cinemo.evaluation.extractors import (
    C3D,
    EXTRACTORS,
    I3D,
    Clip,
    DreamSim,
    FeatureExtractor,
    Inception,
    Lpips,
    load_extractors,
)
from cinemo.types import InputError


class VideoNetwork(nn.Module):
    """Called as I3D's TorchScript is: means of each channel over a video of levels 0..255."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale
        assert resize
        assert return_features
        return x.mean(dim=(2, 3, 4))


class FrameNetwork(nn.Module):
    """Called as Inception's TorchScript is, with bytes."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8
        assert return_features
        return x.float().mean(dim=(2, 3))


class Classes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4)).repeat(1, 2)


class Distance(nn.Module):
    """Mean absolute difference; says of what side its pictures are."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3)) + 1000 * a.shape[-1]


def scripted(network: nn.Module, path: Path) -> str:
    torch.jit.script(network).save(str(path))
    return str(path)


@pytest.fixture
def video_FHWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("kind", "network", "per_frame"),
    [(I3D, VideoNetwork(), False), (Inception, FrameNetwork(), True), (C3D, Classes(), False)],
)
def test_networks_are_called_as_they_expect(
    kind: type[FeatureExtractor], network: nn.Module, per_frame: bool, video_FHWC: np.ndarray, tmp_path: Path
) -> None:
    extractor = kind(scripted(network, tmp_path / "network.pt"))
    rows = extractor.features(video_FHWC)
    assert rows.shape[0] == (20 if per_frame else 1)
    expected = video_FHWC.mean((1, 2)) if per_frame else video_FHWC.mean((0, 1, 2))[None]
    np.testing.assert_allclose(rows[:, :3], expected, rtol=1e-4)
    assert extractor.identity["extractor"] == kind.name
    assert len(extractor.identity["weights"]) == 12
    with pytest.raises(InputError, match=rf"answers with \({len(rows)}, \d+\), expected \(rows, {kind.width}\)"):
        extractor.rows(video_FHWC)  # of another network than the metrics' own


def test_distances_of_pictures(video_FHWC: np.ndarray, tmp_path: Path) -> None:
    place, other_FHWC = scripted(Distance(), tmp_path / "distance.pt"), 255 - video_FHWC
    absolute = np.abs(video_FHWC.astype(float) - other_FHWC).mean((1, 2, 3)) / 255
    lpips = Lpips(place).distances(video_FHWC, other_FHWC)
    np.testing.assert_allclose(lpips - 32_000, 2 * absolute, atol=0.01)  # levels are -1..1
    dreamsim = DreamSim(place).distances(video_FHWC, video_FHWC)
    np.testing.assert_allclose(dreamsim, 224_000)


def save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from cinemo.networks.weights import resolve

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(resolve("package:tiny/tokenizer"))
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_embeddings_are_the_librarys(video_FHWC: np.ndarray, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    extractor = Clip(str(save_clip(tmp_path)))
    model = CLIPModel.from_pretrained(tmp_path).eval()
    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(list(video_FHWC), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(["a red ball"], return_tensors="pt")
    output = model(**tokens, **pixels)
    frames, words = extractor.features(video_FHWC), extractor.words("a red ball")
    assert (frames.shape, words.shape) == ((20, 8), (8,))

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    np.testing.assert_allclose(unit(frames), output.image_embeds.detach(), atol=1e-5)
    np.testing.assert_allclose(unit(words), output.text_embeds[0].detach(), atol=1e-5)
    assert extractor.identity["backbone"] == "16 wide, patches of 16"


def test_weights_that_are_something_else_are_refused(video_FHWC: np.ndarray, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"--extractor i3d=.*state\.pt: is not TorchScript .*expected I3D of Kinetics"):
        load_extractors([f"i3d={tmp_path / 'state.pt'}"])
    with pytest.raises(InputError, match=r"--extractor i3d=.*refuses its input .*expected I3D"):
        I3D(scripted(Classes(), tmp_path / "classes.pt")).features(video_FHWC)
    with pytest.raises(InputError, match="expected NAME=PLACE with one of i3d, inception"):
        load_extractors(["fvd=weights.pt"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"--extractor clip=.*is no CLIPModel"):
        load_extractors([f"clip={tmp_path}"])
    with pytest.raises(InputError, match="nowhere"):
        load_extractors([f"lpips={tmp_path}/nowhere.pt"])


def test_every_extractor_says_what_it_expects() -> None:
    for name, kind in EXTRACTORS.items():
        assert name == kind.name
        assert len(kind.expects) > 30
