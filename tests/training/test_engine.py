"""DeepSpeed's settings follow from the recipe, and its stages, schedule and checkpoints do the same arithmetic."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cinemo.config import Checkpointing, Recipe
from cinemo.methods import build_method
from cinemo.methods.cinemo import CinemoMethod, CinemoTrain
from cinemo.recipes import RECIPES, override
from cinemo.training.checkpoint.shares import STATE, WEIGHT, Shares
from cinemo.training.run import engine
from cinemo.training.run.averaging import EMA, AveragingAdam
from cinemo.training.run.batch import host_batch
from cinemo.types import Condition, InputError, LatentBatch, RunError
from tests.training.conftest import moving_samples


def test_settings_follow_from_the_recipe() -> None:
    paper = RECIPES["cinemo-320x512"]().train
    settings = engine.deepspeed_config(paper.model_copy(update={"micro_batch": 5}))
    assert settings["train_batch_size"] == 80
    assert settings["train_micro_batch_size_per_gpu"] == 5
    assert settings["gradient_accumulation_steps"] == 2  # 80 = 8 workers x 5 x 2
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["bf16"]["enabled"] is True
    assert settings["gradient_clipping"] == 1.0
    assert engine.deepspeed_config(RECIPES["cinemo-tiny"]().train)["bf16"]["enabled"] is False


def test_weight_decay_makes_it_adamw() -> None:
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert type(engine.optimizer(CinemoTrain(), weight)) is torch.optim.Adam
    decayed = engine.optimizer(CinemoTrain(weight_decay=0.1, betas=(0.8, 0.9), lr=3e-4), weight)
    group = decayed.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.1, (0.8, 0.9), 3e-4)
    assert group["decoupled_weight_decay"]


def test_offload_follows_from_the_recipe() -> None:
    def zero(**keys: object) -> dict[str, object]:
        settings = engine.deepspeed_config(CinemoTrain(**keys))
        assert settings["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed's own would be compiled"
        return settings["zero_optimization"]

    bucket = {"reduce_bucket_size": 50_000_000}
    assert zero(zero_stage=1) == {"stage": 1, **bucket}
    overlapped = {"overlap_comm": True, "contiguous_gradients": True, **bucket}
    host = {"device": "cpu", "pin_memory": False}
    assert zero(zero_stage=1, offload="optimizer") == {"stage": 1, **bucket, "offload_optimizer": host}
    on_gpu = zero(zero_stage=3, offload="all", gpus_per_worker=1)
    assert on_gpu == {
        "stage": 3,
        **overlapped,
        "offload_optimizer": host | {"pin_memory": True},
        "offload_param": host | {"pin_memory": True},
    }
    tiny = RECIPES["cinemo-tiny"]()
    with pytest.raises(InputError, match=r"offload is optimizer with zero_stage 0, expected zero_stage 1 or more; set"):
        override(tiny, ["train.zero_stage=0", "train.offload=optimizer"])
    with pytest.raises(InputError, match=r"offload is all with zero_stage 2, .*train\.zero_stage=3 or train\.offload"):
        override(tiny, ["train.zero_stage=2", "train.offload=all"])


def test_communication_follows_from_where_the_workers_are() -> None:
    def zero(across_nodes: bool, **keys: object) -> dict[str, object]:
        found = engine.deepspeed_config(CinemoTrain(**keys), across_nodes)["zero_optimization"]
        return {key: value for key, value in found.items() if not key.startswith("offload")}

    overlapped = {"overlap_comm": True, "contiguous_gradients": True}
    for stage in (1, 2):
        assert zero(True, zero_stage=stage, gpus_per_worker=1) == {
            "stage": stage,
            "reduce_bucket_size": 100_000_000,
            **overlapped,
        }
    whole = {"stage3_param_persistence_threshold": 1_000_000, "stage3_prefetch_bucket_size": 100_000_000}
    assert zero(True, zero_stage=3, gpus_per_worker=1) == {
        "stage": 3,
        "reduce_bucket_size": 100_000_000,
        **overlapped,
        **whole,
    }
    for keys in ({"zero_stage": 2}, {"zero_stage": 0, "gpus_per_worker": 1}):  # no streams; nothing of ZeRO's
        assert zero(True, **keys) == zero(False, **keys)
    asked = {"overlap_comm": False, "reduce_bucket_size": 7, "allgather_bucket_size": 8}
    assert zero(True, zero_stage=2, gpus_per_worker=1, deepspeed=asked) == {
        "stage": 2,
        "contiguous_gradients": True,
        **asked,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"bucket":1}', "train.deepspeed.bucket"),
        ('{"round_robin_gradients":true}', "train.deepspeed.round_robin_gradients"),
        ('{"reduce_bucket_size":0}', "train.deepspeed.reduce_bucket_size"),
        ('{"allgather_bucket_size":3}', "train.deepspeed.allgather_bucket_size"),
        (
            '{"stage3_prefetch_bucket_size":5}',
            "stage3_prefetch_bucket_size is set with zero_stage 2, expected zero_stage 3",
        ),
        ('{"overlap_comm":"perhaps"}', "train.deepspeed.overlap_comm"),
    ],
)
def test_what_deepspeed_may_be_told_is_checked_by_name(settings: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        override(RECIPES["cinemo-tiny"](), ["train.zero_stage=2", f"train.deepspeed={settings}"])
    assert "\n" not in str(caught.value)


def test_what_deepspeed_may_be_told_is_set_key_by_key() -> None:
    tiny = RECIPES["cinemo-tiny"]()
    told = override(tiny, ["train.zero_stage=2", "train.deepspeed.reduce_bucket_size=1000"]).train
    assert engine.deepspeed_config(told)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert override(tiny, ["train.deepspeed=null"]) == tiny, "as recipes of earlier versions have it"
    with pytest.raises(InputError, match=r"did you mean train.deepspeed.reduce_bucket_size"):
        override(tiny, ["train.deepspeed.reduce_bucket=1"])


def test_what_has_no_meaning_at_a_stage_is_refused() -> None:
    tiny = RECIPES["cinemo-tiny"]()
    cases = [(3, "allgather_bucket_size", 2), (0, "reduce_bucket_size", 2), (0, "overlap_comm", False)]
    for stage, key, value in cases:
        with pytest.raises(
            InputError, match=rf"deepspeed\.{key} is set with zero_stage {stage}, expected zero_stage 1"
        ):
            override(tiny, [f"train.zero_stage={stage}", f"train.deepspeed={json.dumps({key: value})}"])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averages_follow_their_formula(decay: float) -> None:
    """ema_n = d_n ema_(n-1) + (1 - d_n) w_n with d_n = min(decay, (n - 1) / (n + 8)); the weights move as without."""
    start = torch.linspace(-1, 1, 5)
    weight, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    averaging = AveragingAdam([weight], decay, lr=0.1)
    adam = torch.optim.Adam([plain], lr=0.1)
    expected = torch.full((5,), float("nan"))
    for n in range(1, 40):
        for parameter, optimizer in ((weight, averaging), (plain, adam)):
            optimizer.zero_grad()
            (parameter - n % 3).square().sum().backward()
            optimizer.step()
        share = min(decay, (n - 1) / (n + 8))
        expected = weight.detach().clone() if n == 1 else share * expected + (1 - share) * weight.detach()
        torch.testing.assert_close(averaging.state[weight][EMA], expected)
    assert torch.equal(weight, plain)


def test_schedule() -> None:
    constant = CinemoTrain(warmup_steps=4, max_steps=100)
    assert [engine.lr_factor(constant, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = CinemoTrain(warmup_steps=10, max_steps=110, schedule="cosine")
    assert engine.lr_factor(cosine, 10) == 1.0
    assert engine.lr_factor(cosine, 60) == pytest.approx(0.5)
    assert engine.lr_factor(cosine, 109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert engine.lr_factor(cosine, 500) == 0.0
    assert engine.lr_factor(CinemoTrain(schedule="cosine"), 0) == 1.0


def _engine(recipe: Recipe, **train: object) -> engine.Engine:
    settings = CinemoTrain(**(recipe.train.model_dump() | train))
    torch.manual_seed(0)
    return engine.Engine(build_method(recipe), settings, torch.device("cpu"))


def _run(made: engine.Engine, recipe: Recipe, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        for start in (0, 2):
            host = host_batch(moving_samples(4)[start : start + 2], step, recipe)
            text = torch.zeros(2, 3, recipe.model.cross_attention_dim, dtype=made.dtype)
            condition = Condition(image=host.video_BCFHW[:, :, 0], text=text, motion_bucket=host.bucket_B)
            loss = made.loss(LatentBatch(host.video_BCFHW, condition), host.t_B, host.noise_BCFHW).mean()
            made.step(loss)
            losses.append(loss.item())
        norms.append(made.grad_norm)
    return losses, norms


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_every_zero_stage_does_the_same_arithmetic(small: Recipe) -> None:
    plain_losses, plain_norms = _run(_engine(small, zero_stage=0), small, range(3))
    assert len(set(plain_losses)) == 6
    assert min(plain_norms) > 0
    for stage in (1, 2, 3):
        losses, norms = _run(_engine(small, zero_stage=stage), small, range(3))
        assert losses == pytest.approx(plain_losses, abs=2e-6), stage
        assert norms == pytest.approx(plain_norms, rel=1e-4), stage


class Reads(TorchDispatchMode):
    """How often the host waits for a value."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_step_reads_the_device_a_few_times_and_not_at_every_weight(
    small: Recipe, stage: int, precision: str
) -> None:
    made = _engine(small, zero_stage=stage, precision=precision)
    _run(made, small, range(1))
    step, found = made._engine.step, []
    with Reads() as reads:

        def watched() -> None:
            before = reads.count
            step()
            found.append(reads.count - before)

        made._engine.step = watched
        _run(made, small, range(1, 2))
    assert len(list(made.method.parameters())) > 100
    assert reads.count >= 2, "the losses"
    assert max(found) <= 5


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_keeps_the_weights_where_they_are(small: Recipe, value: float) -> None:
    made = _engine(small, zero_stage=0, precision="bf16")
    weight = next(parameter for parameter in made.method.parameters() if parameter.dim() > 1)
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient.clone().index_fill_(0, torch.tensor(3), value))
    _run(made, small, range(1))
    assert not made.moved
    assert torch.equal(weight, before)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_computing_things_twice_changes_no_bit(small: Recipe, tmp_path: Path) -> None:
    """Losses and weights after steps with drawn noise, prompts that are dropped and accumulation, in float32."""
    small = override(small, ["train.prompt_dropout=0.5", "train.image_dropout=0.5", "train.noise_offset=0.1"])
    found = {}
    for what in get_args(Checkpointing):
        made = _engine(small, gradient_checkpointing=what)
        made.method.checkpoint_activations(what)  # type: ignore[operator]
        losses, norms = _run(made, small, range(3))
        found[what] = losses, norms, _masters(made, tmp_path / what)[1]
    for what in ("selective", "whole"):
        assert found[what][:2] == found["none"][:2]
        assert all(torch.equal(value, found["none"][2][name]) for name, value in found[what][2].items())


def _masters(made: engine.Engine, directory: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Adam's steps and the float32 weights of a checkpoint written now."""
    made.snapshot({}).write(directory)
    with Shares(directory / STATE) as stored:
        weights = {name: torch.empty(math.prod(shape)) for name, shape in stored.shapes.items()}
        for name, shape in stored.shapes.items():
            stored.read(WEIGHT, name, shape, weights[name])
        return stored.record["adam_steps"], weights


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_parameters_learn_at_their_own_rates(small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every stage, after a resume at another one, and with the schedule on all of them."""

    def rate(name: str, train: CinemoTrain) -> float:
        return 3 * train.lr if "attn_temp" in name else train.lr if "resnets" in name else 0.0

    monkeypatch.setattr(CinemoMethod, "learning_rate", staticmethod(rate))
    settings = {"warmup_steps": 4, "ema_decay": 0.9}
    plain = _engine(small, zero_stage=0, **settings)
    start = {name: value.detach().clone() for name, value in plain.method.named_parameters()}
    _run(plain, small, range(2))
    assert plain.lr == pytest.approx(0.75 * rate("conv_in", small.train))  # the first parameters' own
    plain.snapshot({}).write(tmp_path / "half")
    _run(plain, small, range(2, 4))
    _, expected = _masters(plain, tmp_path / "plain")
    for name, before in start.items():
        moved = bool((expected[name] != before.flatten()).any())
        assert moved == (rate(name, small.train) > 0), name
    for stage in (1, 2, 3):
        made = _engine(small, zero_stage=stage, **settings)
        made.load(tmp_path / "half")
        _run(made, small, range(2, 4))
        _, weights = _masters(made, tmp_path / f"stage {stage}")
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-6, msg=f"{stage} {name}")


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_averages_take_the_place_of_the_weights_and_give_it_back(
    small: Recipe, tmp_path: Path, stage: int, precision: str
) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    def shown() -> dict[str, torch.Tensor]:
        parameters = dict(made.method.named_parameters())
        with GatheredParameters(list(parameters.values()), enabled=stage == 3):
            return {name: value.detach().clone() for name, value in parameters.items()}

    made = _engine(small, zero_stage=stage, precision=precision, ema_decay=0.9)
    _run(made, small, range(3))
    made.snapshot({}).write(tmp_path / "before")
    weights = shown()
    with made.averaged():
        averages = shown()
    assert all(torch.equal(value, weights[name]) for name, value in shown().items())
    assert any(not torch.equal(value, weights[name]) for name, value in averages.items())
    with Shares(tmp_path / "before" / STATE) as stored:
        for name, value in averages.items():
            expected = torch.empty(value.numel())
            stored.read(EMA, name, value.shape, expected)
            assert torch.equal(value.flatten(), expected.to(value.dtype)), name
    losses, _ = _run(made, small, range(3, 4))
    again = _engine(small, zero_stage=stage, precision=precision, ema_decay=0.9)
    again.load(tmp_path / "before")
    assert _run(again, small, range(3, 4))[0] == losses, "the training goes on as if nobody had looked"


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_the_first_step_in_bfloat16_is_adams_first(small: Recipe, tmp_path: Path) -> None:
    """Nothing moves weights or counts steps before it: Adam's bias corrections would be off for good."""
    torch.manual_seed(0)
    begun = {name: value.detach().bfloat16().float() for name, value in build_method(small).named_parameters()}
    after: dict[str, torch.Tensor] = {}
    for stage in range(4):
        made = _engine(small, zero_stage=2, precision="bf16", weight_decay=0.1)
        steps, weights = _masters(made, tmp_path / f"{stage}-begun")
        assert steps == 0
        assert all(torch.equal(weights[name], begun[name].view(-1)) for name in begun), stage
        _run(made, small, range(1))
        steps, weights = _masters(made, tmp_path / f"{stage}-moved")
        assert steps == 1
        moved = max(float((weights[name] - begun[name].view(-1)).abs().max()) for name in begun)
        assert 0.9 < moved / made.lr < 1.5, stage  # Adam's first step: the learning rate, and the decay
        if stage < 3:  # whose linear layers round once more
            after = after or weights
            for name in begun:
                torch.testing.assert_close(weights[name], after[name], rtol=0, atol=1e-6, msg=f"{stage} {name}")


@pytest.mark.usefixtures("process_group")
def test_accumulated_micro_batches_equal_one_batch(small: Recipe) -> None:
    """Weights move once per global batch, by the mean gradient: with SGD-like first steps the losses agree."""
    twice = _engine(small, micro_batch=2)
    whole = _engine(small, micro_batch=4)
    _run(twice, small, range(1))
    host = host_batch(moving_samples(4), 0, small)
    text = torch.zeros(4, 3, small.model.cross_attention_dim)
    condition = Condition(image=host.video_BCFHW[:, :, 0], text=text, motion_bucket=host.bucket_B)
    whole.step(whole.loss(LatentBatch(host.video_BCFHW, condition), host.t_B, host.noise_BCFHW).mean())
    assert whole.grad_norm == pytest.approx(twice.grad_norm, rel=1e-4)
    assert whole.lr == twice.lr


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_checkpoint_continues_as_if_nothing_happened(
    small: Recipe, tmp_path: Path, stage: int, precision: str
) -> None:
    settings = {"zero_stage": stage, "precision": precision, "schedule": "cosine", "warmup_steps": 3, "max_steps": 9}
    undisturbed, _ = _run(made := _engine(small, **settings), small, range(2))
    made.snapshot({"step": 2, "note": [1.5]}).write(tmp_path)
    after, _ = _run(made, small, range(2, 4))
    restored = _engine(small, **settings)
    assert restored.load(tmp_path) == {"step": 2, "note": [1.5]}
    assert _run(restored, small, range(2, 4))[0] == pytest.approx(after, abs=1e-6)
    assert restored.lr == made.lr
    assert after != undisturbed


@pytest.mark.usefixtures("process_group")
def test_what_a_resume_may_change(small: Recipe, tmp_path: Path) -> None:
    """The learning rate is the recipe's, not the checkpoint's; averages may come later: they begin at the weights."""
    made = _engine(small, lr=2e-3)
    _run(made, small, range(3))
    made.snapshot({}).write(tmp_path)
    gentle = _engine(small, lr=1e-5, ema_decay=0.9)
    gentle.load(tmp_path)
    assert gentle.lr == 1e-5
    gentle.snapshot({}).write(tmp_path / "again")
    with Shares(tmp_path / STATE) as old, Shares(tmp_path / "again" / STATE) as new:
        for name, shape in old.shapes.items():
            weight, average, stored = (torch.empty(math.prod(shape)) for _ in range(3))
            old.read(WEIGHT, name, shape, stored)
            new.read(WEIGHT, name, shape, weight)
            new.read(EMA, name, shape, average)
            assert torch.equal(weight, stored)
            assert torch.equal(average, stored)
    before = {name: value.detach().clone() for name, value in gentle.method.named_parameters()}
    _run(gentle, small, range(3, 4))
    moved = max((value.detach() - before[name]).abs().max() for name, value in gentle.method.named_parameters())
    assert 0 < moved < 2e-5, "an Adam step is about the learning rate"


@pytest.mark.usefixtures("process_group")
def test_loading_nothing_is_refused(small: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold a training state"):
        _engine(small).load(tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_bfloat16_weights_travel_and_add_up_in_float32(stage: int) -> None:
    bf16 = engine.deepspeed_config(CinemoTrain(zero_stage=stage, precision="bf16"))
    assert bf16.get("communication_data_type") == ("fp32" if stage else None)
    assert bf16.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage >= 2 else None)
    fp32 = engine.deepspeed_config(CinemoTrain(zero_stage=stage, precision="fp32"))
    assert not {"communication_data_type", "data_types"} & set(fp32)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_adam_is_fused_everywhere(gpus: float, offload: str) -> None:
    train = CinemoTrain(gpus_per_worker=gpus, offload=offload)
    assert engine.optimizer(train, [torch.nn.Parameter(torch.zeros(1))]).defaults["fused"]


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_small_gradients_are_not_lost_among_many_micro_batches(small: Recipe) -> None:
    """A gradient of 1, then 63 of 2^-9 each, of which bfloat16 would lose every one: their mean is what Adam sees."""
    made = _engine(small, zero_stage=2, precision="bf16", micro_batch=1, global_batch=64, lanes=2, grad_clip=0)
    weight = made.method.get_parameter("unet.conv_in.weight")
    for number in range(64):
        host = host_batch(moving_samples(1), 0, small)
        text = torch.zeros(1, 3, small.model.cross_attention_dim, dtype=made.dtype)
        condition = Condition(image=host.video_BCFHW[:, :, 0], text=text, motion_bucket=host.bucket_B)
        loss = made.loss(LatentBatch(host.video_BCFHW, condition), host.t_B, host.noise_BCFHW).mean()
        made.step(0 * loss + weight.sum() * (2**-9 if number else 1))
    expected = (1 + 63 * 2**-9) / 64 * math.sqrt(weight.numel())
    assert made.grad_norm == pytest.approx(expected, rel=1e-3)
