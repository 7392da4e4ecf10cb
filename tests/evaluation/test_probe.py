"""The probe tells the two motion scales apart, on tables and on the network that ships with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cinemo.bundle import ModelBundle, load_bundle, save_bundle
from cinemo.evaluation.probe import IDS, judge, probe_motion_scale
from cinemo.media.motion import MORE_MOTION, STILLER, UNIFORM_EDGES, MotionScale
from cinemo.media.synthetic import render_clip
from cinemo.networks.attention import TextKeysValues
from cinemo.networks.weights import load_unet
from cinemo.recipes.cinemo import cinemo_tiny


def test_tables_of_either_kind_and_of_none() -> None:
    rng = np.random.default_rng(0)
    ids = np.array(IDS)
    saturating = 1 - (np.minimum(ids, 19) + 0.5) / 20  # what such a network does beyond 19 is nobody's promise
    for table, verdict in ((saturating, MORE_MOTION), (ids / 100, STILLER)):
        probe = judge(IDS, [np.clip(table + 0.02 * rng.normal(size=len(ids)), 0, 1) for _ in range(3)])
        assert probe.verdict == verdict
        errors = {MORE_MOTION: probe.error_more_motion, STILLER: probe.error_stiller}
        assert errors[verdict] < 0.05 < max(errors.values())
    assert judge(IDS, [[0.8] * len(IDS)] * 2).verdict is None
    assert judge(IDS, [rng.permutation(ids) / 100 for _ in range(40)]).verdict is None


def test_a_bucket_in_the_networks_words() -> None:
    paper, code = MotionScale(UNIFORM_EDGES), MotionScale(UNIFORM_EDGES, scale=STILLER)
    assert [paper.motion_id(bucket) for bucket in (0, 7, 19)] == [0, 7, 19]
    assert [code.motion_id(bucket) for bucket in (0, 7, 19)] == pytest.approx([97.5, 62.5, 2.5])


class _OtherScale(nn.Module):
    """A network that was trained on 100 x SSIM: it understands its id as the tiny one understands a bucket."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def keys_values(self, text: Tensor) -> TextKeysValues:
        return self.unet.keys_values(text)

    def forward(self, sample: Tensor, t: Tensor, text: TextKeysValues, ids: Tensor, deep: object = None) -> Tensor:
        return self.unet(sample, t, text, (20 * (1 - ids / 100) - 0.5).clamp(0, 19))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    recipe = cinemo_tiny()
    directory = tmp_path_factory.mktemp("base") / "bundle"
    save_bundle(directory, recipe, {"unet": load_unet(recipe.model, str(recipe.train.init), torch.float32)}, {})
    return load_bundle(directory, "cpu")


@pytest.mark.slow
@pytest.mark.release
def test_the_shipped_network_follows_the_paper_and_its_mirror_the_code(bundle: ModelBundle) -> None:
    clip = render_clip(1000, 1, frames=1)
    images = [(clip.frames_FHWC[0], "")]
    assert probe_motion_scale(bundle, images, steps=10).verdict == MORE_MOTION
    mirrored = type(bundle.method)(_OtherScale(bundle.method.unet), bundle.method.schedule, bundle.method.sample)  # type: ignore[arg-type]
    assert probe_motion_scale(replace(bundle, method=mirrored), images, steps=10).verdict == STILLER


def test_the_scale_is_kept_in_the_bundle(tmp_path: Path, bundle: ModelBundle) -> None:
    unet = bundle.method.unet
    save_bundle(tmp_path / "b", cinemo_tiny(), {"unet": unet}, {}, STILLER)
    middle = 50 * (cinemo_tiny().data.bucket_edges[-1] + 1)
    assert load_bundle(tmp_path / "b", "cpu").motion.motion_id(0) == pytest.approx(middle)
    assert bundle.motion.scale == MORE_MOTION
