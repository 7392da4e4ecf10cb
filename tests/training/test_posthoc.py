"""An average of any width follows from snapshots of two: by the formulas, and as it was tracked in a training."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from cinemo.bundle import load_bundle
from cinemo.config import Recipe
from cinemo.methods.cinemo import CinemoTrain
from cinemo.recipes import override
from cinemo.training.checkpoint import checkpoints, snapshots
from cinemo.training.checkpoint.profiles import NARROWEST, WIDEST, Profile, coefficients, exponent, share_of_new
from cinemo.training.run.engine import Engine
from cinemo.types import InputError
from tests.training.conftest import sizes
from tests.training.ranks import made_engine, train_steps

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (0.05, 0.1)


def _tracked_profile(width: float, steps: int) -> np.ndarray:
    """What the average holds of the weights of each step, by the rule that the optimiser applies."""
    weights = np.zeros(steps)
    for count in range(1, steps + 1):
        share = share_of_new(count, exponent(width))
        weights *= 1 - share
        weights[count - 1] += share
    return weights


@pytest.mark.parametrize("width", [NARROWEST, 0.03, 0.1, 0.2, WIDEST])
@pytest.mark.parametrize("steps", [1, 7, 3000])
def test_a_profile_is_what_the_running_average_weighs_and_has_its_width(width: float, steps: int) -> None:
    tracked = _tracked_profile(width, steps)
    np.testing.assert_allclose(np.diff(Profile(width, steps).up_to(np.arange(steps + 1))), tracked, atol=1e-12)
    assert tracked.sum() == pytest.approx(1)
    if steps == 3000:
        middles = np.arange(steps) + 0.5
        mean = (tracked * middles).sum()
        assert math.sqrt((tracked * (middles - mean) ** 2).sum()) / steps == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize("steps", [40, 1000, 200_000])
@pytest.mark.parametrize("width", [0.03, 0.05, 0.08, 0.15])
def test_coefficients_rebuild_the_profile(steps: int, width: float) -> None:
    stored = [Profile(own, steps * part // 20) for part in range(1, 21) for own in WIDTHS]
    found, off = coefficients(stored, Profile(width, steps))
    assert sum(found) == pytest.approx(1)
    assert off < (0.05 if width < WIDTHS[0] else 0.02)
    if width in WIDTHS:
        assert off < 1e-3
    # Every weight is multiplied by at most so much: rounding of what is stored stays rounding.
    assert sum(map(abs, found)) < 15
    _, off_few = coefficients(stored[-2:], Profile(width, steps))
    assert off_few > off - 1e-9, "more snapshots are no worse"


def test_how_many_snapshots_there_are_is_bounded() -> None:
    def train(**settings: object) -> CinemoTrain:
        return CinemoTrain(posthoc_ema=WIDTHS, **settings)

    for most in (2, 7, 32):
        for every in (1, 10, 1000):
            for steps in (1, 31, 32, 999, 100_000):
                made = train(posthoc_snapshots=most, checkpoint_every=every, max_steps=steps)
                done = [step for step in {*range(every, steps + 1, every), steps} if snapshots.is_due(made, step)]
                assert len(done) == snapshots.count(made) <= most, (most, every, steps)
    assert not snapshots.is_due(CinemoTrain(max_steps=10), 10)
    assert snapshots.size(train(), 10) == 40, "two averages in float16"
    tiny = Recipe.model_validate({"name": "x", "method": "cinemo"})
    for wrong in ("[0.05]", "[0.1,0.05]", "[0.05,0.5]"):
        with pytest.raises(InputError, match="posthoc_ema"):
            override(tiny, [f"train.posthoc_ema={wrong}"])


def _saved(engine: Engine, recipe: Recipe, output: Path, step: int) -> None:
    snapshots.write(str(output), step, engine)
    directory = output / checkpoints.RUN / f"checkpoint_2030-01-01_00-00-{step:02d}.000001"
    directory.mkdir(parents=True)
    engine.snapshot({"step": step}).write(directory)
    checkpoints.describe(directory, recipe, step, 1, "digest", sizes(directory))


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_a_reconstructed_average_is_the_one_that_was_tracked(
    small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also through a resume, which takes the averages up, and with a snapshot missing."""
    settings = {"posthoc_ema": WIDTHS, "max_steps": 40, "checkpoint_every": 4, "posthoc_snapshots": 10}
    slim = override(small, ["model.block_out_channels=[32]"])
    recipe = slim.model_copy(update={"train": CinemoTrain(**(slim.train.model_dump() | settings))})
    engine, output, width = made_engine(recipe, **settings), tmp_path / "run", 0.08
    tracked: dict[str, Tensor] = {}
    for step in range(40):
        if step == 20:
            engine = made_engine(recipe, **settings, zero_stage=0)
            engine.load(output / checkpoints.RUN / "checkpoint_2030-01-01_00-00-20.000001")
        train_steps(engine, recipe, range(step, step + 1))
        share = share_of_new(step + 1, exponent(width))
        for name, parameter in engine.method.named_parameters():
            tracked.setdefault(name, parameter.detach().clone()).lerp_(parameter.detach(), share)
        if (step + 1) % 4 == 0:
            _saved(engine, recipe, output, step + 1)
    (output / snapshots.DIRECTORY / "step-00000016" / "rank-00000.safetensors").write_bytes(b"cut")

    main = runpy.run_path(str(ROOT / "pipelines/export.py"))["main"]
    main(["--checkpoint", str(output), "--ema-std", "0.08", "--output", str(tmp_path / "bundle")])
    assert "averaged with width 0.08 (of 9 snapshots, to within 0." in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "bundle")
    averaged = {name: value.detach() for name, value in bundle.method.named_parameters()}
    weights = {name: value.detach() for name, value in engine.method.named_parameters()}
    off = math.sqrt(sum(float((averaged[name] - value).square().sum()) for name, value in tracked.items()))
    apart = math.sqrt(sum(float((weights[name] - value).square().sum()) for name, value in tracked.items()))
    print(f"off by {off:.2e}, where the weights are {apart:.2e} away")
    assert off < 0.01 * apart

    with pytest.raises(InputError, match=r"--ema-std is 0\.28: the 9 snapshots .* make it only to within \d+%"):
        main(["--checkpoint", str(output), "--ema-std", "0.28", "--output", str(tmp_path / "wide")])
    with pytest.raises(InputError, match=r"--ema-std is 0\.5, expected a share of the training, 0\.005\.\.0\.28"):
        main(["--checkpoint", str(output), "--ema-std", "0.5", "--output", str(tmp_path / "wide")])
    with pytest.raises(InputError, match="--ema-std: only for a bundle made from a checkpoint"):
        main(["--from-lavie", "x.pt", "--ema-std", "0.08", "--output", str(tmp_path / "wide")])
