"""The loop learns, draws the same whichever rank holds a sample, and stops at a loss that is none."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from cinemo.bundle import load_bundle, save_bundle
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.dataset.statistics import latent_statistics, with_statistics
from cinemo.data.loading.loader import LatentLoader, StepBatch
from cinemo.data.loading.mix import MixedLoader
from cinemo.methods import build_method
from cinemo.networks.frozen import Vae
from cinemo.training.report.metrics import Report
from cinemo.training.run import batch as batches
from cinemo.training.run.dataset_check import check_dataset
from cinemo.training.run.engine import Engine
from cinemo.training.run.left_out import LeftOut
from cinemo.training.run.loop import prefetch, train
from cinemo.types import InputError, RunError
from tests.training.conftest import moving_samples


class Letters:
    """A text encoder that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return torch.tensor([[[float(len(text))] * 4] * 2 for text in texts])


def _changed(recipe: Recipe, **train_keys: object) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train_keys)})


def test_draws_depend_on_sample_and_step_alone(small: Recipe) -> None:
    samples = moving_samples(6)
    whole = batches.host_batch(samples, 5, small)
    for order in ([5, 4, 3, 2, 1, 0], [2], [3, 1]):
        part = batches.host_batch([samples[place] for place in order], 5, small)
        assert torch.equal(part.noise_BCFHW, whole.noise_BCFHW[order])
        assert torch.equal(part.t_B, whole.t_B[order])
        assert part.texts["text"] == tuple(whole.texts["text"][place] for place in order)
    later = batches.host_batch(samples, 6, small)
    assert not torch.equal(later.t_B, whole.t_B)
    other = batches.host_batch(samples, 5, _changed(small, seed=1))
    assert not torch.allclose(other.noise_BCFHW, whole.noise_BCFHW)
    # A dataset smaller than a global batch has its samples several times in a step, in different epochs.
    twice = batches.host_batch([samples[2], samples[2]], 5, small, [0, 1])
    assert torch.equal(twice.noise_BCFHW[0], whole.noise_BCFHW[2])
    assert not torch.allclose(twice.noise_BCFHW[0], twice.noise_BCFHW[1])


def test_high_noise_first_then_all(small: Recipe) -> None:
    """`train.timestep_shift` holds for `timestep_shift_steps` steps; after them the draws are those without it."""
    scheduled = _changed(small, timestep_shift=6.0, timestep_shift_steps=30)

    def drawn(recipe: Recipe, steps: range) -> torch.Tensor:
        return torch.cat([batches.host_batch(moving_samples(8), step, recipe).t_B for step in steps])

    assert torch.equal(drawn(scheduled, range(30)), drawn(_changed(small, timestep_shift=6.0), range(30)))
    assert float(drawn(scheduled, range(30)).float().mean()) > 700
    assert torch.equal(drawn(scheduled, range(30, 40)), drawn(small, range(30, 40)))


def test_normalised_batches_have_channels_alike(small: Recipe, dataset: str, tmp_path: Path) -> None:
    """`encoders.normalize` takes its numbers from the dataset; without it, latents are what is stored."""
    index = DatasetIndex.load(dataset)
    samples = LatentLoader(index, global_batch=8, lanes=1, seed=0).batch(0).samples
    stored = torch.from_numpy(np.stack([sample.latents_FCHW for sample in samples]).astype(np.float32))
    assert with_statistics(small, index) is small
    assert torch.equal(batches.host_batch(samples, 0, small).video_BCFHW, stored.transpose(1, 2))

    encoders = small.encoders.model_copy(update={"normalize": True})
    asking = small.model_copy(update={"encoders": encoders})
    with pytest.raises(InputError, match=r"has no latent_statistics, which encoders\.normalize needs"):
        with_statistics(asking, index)
    sizes = dict(zip(index.shards, index.samples_of_shards.tolist(), strict=True))
    measured = replace(index, info=index.info | {"latent_statistics": latent_statistics(dataset, sizes)})
    lies = (
        {"mean": [0.0]},
        {"mean": [0.0] * 3, "std": [1.0] * 3},
        {"mean": [0.0] * 4, "std": [1.0, 1.0, 0.0, 1.0]},
        [1],
    )
    for lie in lies:
        with pytest.raises(InputError, match=r"latent_statistics in dataset\.json is damaged, .* of 4 channels"):
            with_statistics(asking, replace(index, info=index.info | {"latent_statistics": lie}))
    normal = with_statistics(asking, measured)
    everything = LatentLoader(index, global_batch=index.info["samples"], lanes=1, seed=0).batch(0).samples
    video = batches.host_batch(everything, 0, normal).video_BCFHW
    torch.testing.assert_close(video.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(video.std((0, 2, 3, 4)), torch.ones(4), atol=1e-3, rtol=0)
    assert normal.encoders.statistics is not None
    # Whoever loads the bundle gets latents normalised alike, from the autoencoder's own configuration.
    save_bundle(tmp_path / "bundle", normal, build_method(normal).networks, {"made": "by a test"})
    bundle = load_bundle(tmp_path / "bundle", "cpu")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in normal.encoders.statistics)
    torch.testing.assert_close(bundle.vae.encode(pixels), (Vae(small.encoders.vae).encode(pixels) - mean) / deviation)
    assert not bundle.recipe.encoders.normalize


def test_draws_have_the_right_distribution(small: Recipe) -> None:
    drawn = [batches.host_batch(moving_samples(8), step, small) for step in range(120)]
    noise = torch.cat([one.noise_BCFHW for one in drawn])
    assert noise.shape[1:] == (4, 3, 4, 4)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    steps = torch.cat([one.t_B for one in drawn]).float()
    assert 0 <= steps.min() < 10
    assert 990 < steps.max() <= 999
    assert float(steps.mean()) == pytest.approx(499.5, abs=40)


def test_a_batch_holds_what_was_stored(small: Recipe) -> None:
    samples = moving_samples(3)
    made = batches.host_batch(samples, 0, _changed(small, prompt_dropout=0.0))
    assert made.video_BCFHW.shape == (3, 4, 4, 4, 4)
    assert np.array_equal(made.video_BCFHW[1].transpose(0, 1).numpy(), samples[1].latents_FCHW.astype(np.float32))
    assert made.bucket_B.tolist() == sorted(made.bucket_B.tolist())  # their motion grows
    assert made.texts["text"] == ("a dog", "a red car", "waves")
    on_device, t_B, noise = batches.on_device(
        made, batches.FrozenStates(Letters()), torch.device("cpu"), torch.bfloat16
    )
    assert torch.equal(on_device.condition["image"], made.video_BCFHW[:, :, 0])
    assert on_device.condition["text"].dtype == torch.bfloat16
    assert (t_B.shape, noise.dtype) == ((3,), torch.float32)


def test_prompts_are_dropped_at_the_given_rate(small: Recipe) -> None:
    def dropped(share: float, steps: int) -> list[bool]:
        recipe, sample = _changed(small, prompt_dropout=share), moving_samples(1)
        return [batches.host_batch(sample, step, recipe).texts["text"] == ("",) for step in range(steps)]

    rare = dropped(0.3, 1500)
    assert sum(rare) / 1500 == pytest.approx(0.3, abs=0.04)
    assert rare[:50] == dropped(0.3, 50)
    assert not any(dropped(0.0, 100))
    assert all(dropped(1.0, 100))


def test_the_paper_s_draws_are_what_they_were(small: Recipe) -> None:
    """Frozen: a checkpoint of an older version goes on with the same draws."""
    made = batches.host_batch(moving_samples(6), 7, small)
    assert made.t_B.tolist() == [132, 211, 290, 287, 169, 935]
    assert made.texts["text"] == ("", "", "waves", "a dog", "", "")
    frozen = [0.68777448, 0.23370352, -0.60557210, -0.82488787]
    assert made.noise_BCFHW[2, 1, 1, 3].tolist() == pytest.approx(frozen, abs=1e-5)
    assert made.fields["image_given"].all()
    assert made.fields["motion_given"].all()


def test_images_and_motion_are_dropped_on_their_own(small: Recipe) -> None:
    """At the given rates, independently; the residuals and the bucket itself stay as they are."""
    recipe = _changed(small, image_dropout=0.3, motion_dropout=0.2, prompt_dropout=0.5)
    drawn = [batches.host_batch(moving_samples(8), step, recipe) for step in range(250)]
    images = ~torch.cat([one.fields["image_given"] for one in drawn])
    motions = ~torch.cat([one.fields["motion_given"] for one in drawn])
    prompts = torch.tensor([caption == "" for one in drawn for caption in one.texts["text"]])
    for share, dropped in ((0.3, images), (0.2, motions), (0.5, prompts)):
        assert float(dropped.float().mean()) == pytest.approx(share, abs=0.04)
    for share, both in ((0.06, images & motions), (0.15, images & prompts), (0.1, motions & prompts)):
        assert float(both.float().mean()) == pytest.approx(share, abs=0.03)
    one = next(host for host in drawn if host.fields["image_given"].any() and not host.fields["image_given"].all())
    part = batches.host_batch(moving_samples(8)[3:5], drawn.index(one), recipe)  # as another rank would hold them
    assert torch.equal(part.fields["image_given"], one.fields["image_given"][3:5])
    assert torch.equal(part.fields["motion_given"], one.fields["motion_given"][3:5])

    plain = batches.host_batch(moving_samples(8), drawn.index(one), small)
    for name in ("video_BCFHW", "bucket_B", "t_B", "noise_BCFHW"):
        assert torch.equal(getattr(one, name), getattr(plain, name)), name
    batch, _, _ = batches.on_device(one, batches.FrozenStates(Letters()), torch.device("cpu"), torch.float32)
    assert torch.equal(batch.video_BCFHW, one.video_BCFHW)
    for place, given in enumerate(one.fields["image_given"]):
        expected = one.video_BCFHW[place, :, 0] if given else torch.zeros(4, 4, 4)
        assert torch.equal(batch.condition["image"][place], expected)
    assert torch.equal(batch.condition["motion_bucket"].isnan(), ~one.fields["motion_given"])


@pytest.mark.usefixtures("process_group")
def test_a_training_that_drops_everything_stays_finite(small: Recipe, dataset: str) -> None:
    reports = _train(_changed(small, max_steps=3, image_dropout=1.0, motion_dropout=1.0, prompt_dropout=1.0), dataset)
    assert all(np.isfinite(report.loss) and np.isfinite(report.grad_norm) for report in reports)


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_timesteps_are_drawn_uniformly_or_towards_noise(small: Recipe, shift: float) -> None:
    samples, recipe = moving_samples(8), _changed(small, timestep_shift=shift)
    drawn = torch.cat([batches.host_batch(samples, step, recipe).t_B for step in range(150)])
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) <= recipe.diffusion.train_steps - 1
    # u in 0..1 goes to s u / (1 + (s - 1) u).
    for share in (0.25, 0.5, 0.75):
        place = shift * share / (1 + (shift - 1) * share) * recipe.diffusion.train_steps
        assert float((drawn < place).double().mean()) == pytest.approx(share, abs=0.05)


def test_offset_noise_is_one_value_a_channel(small: Recipe) -> None:
    samples, recipe = moving_samples(4), _changed(small, noise_offset=0.5)
    added = []
    for step in range(100):
        shifted, plain = batches.host_batch(samples, step, recipe), batches.host_batch(samples, step, small)
        assert torch.equal(shifted.t_B, plain.t_B)
        offset = shifted.noise_BCFHW - plain.noise_BCFHW
        torch.testing.assert_close(offset, offset[:, :, :1, :1, :1].expand_as(offset), rtol=0, atol=1e-5)
        added.append(offset[:, :, 0, 0, 0])
    values = torch.cat(added)  # 400 samples of 4 channels
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(0.5, abs=0.04)
    assert float(torch.corrcoef(values.T).fill_diagonal_(0).abs().max()) < 0.2
    alone = batches.host_batch(samples[2:3], 99, recipe)
    assert torch.equal(alone.noise_BCFHW[0], shifted.noise_BCFHW[2])


def test_text_states_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TEXT_CACHE", 2)
    encoder = Letters()
    text = batches.FrozenStates(encoder).texts
    assert text(["", "dog", "", "dog"])[:, 0, 0].tolist() == [0, 3, 0, 3]
    assert text(["dog", ""])[:, 0, 0].tolist() == [3, 0]
    assert encoder.asked == ["", "dog"]
    assert text(["whale", "cat", "cat", "elephant"])[:, 0, 0].tolist() == [5, 3, 3, 8]  # more than are kept
    assert text(["dog"])[0, 0, 0] == 3
    assert encoder.asked == ["", "dog", "whale", "cat", "elephant", "dog"]


def test_another_geometry_is_refused(small: Recipe, dataset: str) -> None:
    index = DatasetIndex.load(dataset)
    check_dataset(index, small)
    wide = small.model_copy(update={"data": small.data.model_copy(update={"size": (32, 64)})})
    with pytest.raises(InputError, match=r"latents 4x4x4x4, recipe cinemo-tiny expects 4x4x4x8"):
        check_dataset(index, wide)
    with pytest.raises(InputError, match="sample clip000_0: latents are 4x4x4x4"):
        batches.host_batch(moving_samples(1), 0, wide)


def _train(recipe: Recipe, dataset: str, start: int = 0, made: Engine | None = None) -> list[Report]:
    torch.manual_seed(0)
    made = made or Engine(build_method(recipe), recipe.train, torch.device("cpu"))
    loader = LatentLoader(
        DatasetIndex.load(dataset), global_batch=recipe.train.global_batch, lanes=recipe.train.lanes, seed=0
    )
    text = batches.FrozenStates.of(recipe)
    reports: list[Report] = []
    train(recipe, made, loader.batches(start), text, start, on_report=reports.append)
    return reports


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_it_overfits_a_small_set(small: Recipe, dataset: str) -> None:
    reports = _train(_changed(small, max_steps=60, log_every=6, lr=4e-3, micro_batch=4), dataset)
    assert [report.step for report in reports] == list(range(6, 61, 6))
    assert reports[0].loss > 0.5  # a fresh network answers nothing of the noise, whose variance is 1
    assert np.mean([report.loss for report in reports[-3:]]) < 0.6 * reports[0].loss
    assert all(report.samples_per_second > 0 and 0 <= report.data_wait <= 1 for report in reports)


@pytest.mark.usefixtures("process_group")
def test_what_is_called_when(small: Recipe, dataset: str) -> None:
    recipe = _changed(small, max_steps=7, log_every=3, checkpoint_every=4, sample_every=5)
    made = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
    calls: list[tuple[str, int]] = []
    loader = LatentLoader(DatasetIndex.load(dataset), global_batch=4, lanes=2, seed=0)
    text = batches.FrozenStates.of(recipe)
    train(
        recipe,
        made,
        loader.batches(1),
        text,
        1,
        on_report=lambda report: calls.append(("report", report.step)),
        on_checkpoint=lambda step: calls.append(("checkpoint", step)),
        on_sheet=lambda step: calls.append(("sheet", step)),
    )
    assert calls == [
        ("report", 3),
        *[("report", 4), ("checkpoint", 4)],
        *[("report", 5), ("sheet", 5)],
        ("report", 6),
        *[("report", 7), ("checkpoint", 7), ("sheet", 7)],
    ]


@pytest.mark.usefixtures("process_group")
def test_a_loss_that_is_no_number_moves_nothing_is_told_and_stops_the_run_when_it_stays(
    small: Recipe, dataset: str
) -> None:
    def run(spoilt: range, limit: int) -> list[Report]:
        recipe = _changed(small, max_steps=8, log_every=4, max_skipped_steps=limit)
        made = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
        clean, calls = made.loss, iter(range(100))

        def spoiled(*arguments: object) -> torch.Tensor:
            loss = clean(*arguments)  # type: ignore[arg-type]
            return loss * torch.tensor([1.0, float("nan")]) if next(calls) in spoilt else loss

        made.loss = spoiled  # type: ignore[method-assign]
        return _train(recipe, dataset, made=made)

    loader = LatentLoader(DatasetIndex.load(dataset), global_batch=4, lanes=2, seed=0)
    keys = loader.batch(2).keys
    first, second = run(range(4, 5), 1 + 1)  # two micro batches a step
    assert (first.step, first.skipped_steps, first.unmoved) == (4, 1, {3: (keys[1],)})
    assert math.isfinite(first.loss)
    assert math.isfinite(first.grad_norm)
    assert (second.skipped_steps, second.unmoved) == (0, {})
    wanted = "steps 3-4: the gradient is not finite in 2 steps in a row .*samples " + ", ".join(
        key for step in (2, 3) for key in loader.batch(step).keys[1::2]
    )
    with pytest.raises(RunError, match=wanted) as stopped:
        run(range(4, 100), 2)
    assert "--skip-steps 3-4" in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.usefixtures("process_group")
def test_what_the_recipe_passes_over_leaves_no_trace(small: Recipe, dataset: str) -> None:
    """Neither in weights nor in moments; a sample that is no number is left out of its batch and of nothing else."""
    index = DatasetIndex.load(dataset)
    plain = MixedLoader([LatentLoader(index, global_batch=4, lanes=2, seed=0)], [Fraction(1)])
    gone = plain.batch(1).keys[2]

    class Poisoned(MixedLoader):
        def batch(self, step: int) -> StepBatch:
            made = super().batch(step)
            nan = np.full_like(made.samples[0].latents_FCHW, np.nan)
            samples = [one.changed(latents_FCHW=nan) if one.key == gone else one for one in made.samples]
            return replace(made, samples=samples)

    loader = Poisoned(plain.loaders, [Fraction(1)])
    recipe = _changed(small, max_steps=5, skip_steps=("1", "4-5"), skip_samples=(gone,))
    left_out = LeftOut.of(recipe.train)
    batches_seen = [left_out.batch(loader, step) for step in range(5)]
    assert [len(one.keys) for one in batches_seen] == [0, 3, 4, 0, 0]
    assert [list(one.keys) for one in batches_seen] == [left_out.seen(s, plain.batch(s).keys) for s in range(5)]

    text = batches.FrozenStates.of(recipe)

    def trained(steps: list[StepBatch], recipe: Recipe) -> tuple[list[Report], torch.Tensor]:
        torch.manual_seed(0)
        made, reports = Engine(build_method(recipe), recipe.train, torch.device("cpu")), list[Report]()
        train(recipe, made, steps, text, on_report=reports.append)
        return reports, torch.cat([p.detach().flatten() for p in made.method.parameters()])

    reports, weights = trained(batches_seen, recipe)
    assert [math.isfinite(report.loss) for report in reports] == [False, True, True, False, False]
    assert not any(report.skipped_steps for report in reports)
    # Of the same draws: steps that are passed over count.
    stand_in = plain.batch(1).samples[0]
    there = [stand_in if one.key == gone else one for one in plain.batch(1).samples]
    weighted = StepBatch(1, 0, there, [float(one.key != gone) for one in plain.batch(1).samples])
    by_hand = [StepBatch(0, 0, []), weighted, plain.batch(2), StepBatch(3, 0, []), StepBatch(4, 0, [])]
    _, expected = trained(by_hand, recipe)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("process_group")
def test_what_is_left_out_leaves_the_mean_of_the_rest(small: Recipe) -> None:
    """Loss and gradient are those of the samples that are there; without any, the step changes nothing."""
    first, second, other, _ = moving_samples(4)
    text = batches.FrozenStates.of(small)

    def step(batch: StepBatch, **changed: object) -> tuple[Report, torch.Tensor]:
        torch.manual_seed(0)
        recipe = _changed(small, max_steps=1, **changed)
        made = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
        reports: list[Report] = []
        train(recipe, made, [batch], text, on_report=reports.append)
        return reports[0], torch.cat([p.detach().flatten().float() for p in made.method.parameters()])

    expected, _ = step(StepBatch(0, 0, [first, first, second, second]))
    got, _ = step(StepBatch(0, 0, [first, other, other, second], [1.0, 0.0, 0.0, 1.0]), on_damaged="skip")
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    uneven, _ = step(StepBatch(0, 0, [first, second, other, other], [1.0, 1.0, 0.0, 0.0]), on_damaged="skip")
    assert uneven.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    nothing, weights = step(StepBatch(0, 0, [other] * 4, [0.0] * 4), on_damaged="skip")
    assert math.isnan(nothing.loss)
    assert nothing.grad_norm == 0
    assert torch.isfinite(weights).all()


@pytest.mark.usefixtures("process_group")
def test_data_of_another_step_is_refused(small: Recipe) -> None:
    made = Engine(build_method(small), small.train, torch.device("cpu"))
    text = batches.FrozenStates(Letters())
    with pytest.raises(RunError, match="expected the batch of step 3, got 0"):
        train(small, made, [StepBatch(0, 0, moving_samples(4))], text, start_step=3)
    with pytest.raises(RunError, match="expected the batch of step 0, got none"):
        train(small, made, [], text)


def test_prefetch_keeps_order_raises_and_stops() -> None:
    assert list(prefetch(iter(range(20)))) == list(range(20))

    def failing() -> Iterator[int]:
        yield 1
        raise InputError("broken")

    ready = prefetch(failing())
    assert next(ready) == 1
    with pytest.raises(InputError, match="broken"):
        next(ready)

    made = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    ready = prefetch(endless(), depth=2)
    assert next(ready) == 0
    ready.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread outlives its reader"
        time.sleep(0.02)
    assert len(made) <= 5
