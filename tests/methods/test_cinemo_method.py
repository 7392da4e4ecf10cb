from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from goldens import FLOAT32, FLOAT64, Golden, Tally, fill_golden, golden_files
from torch import Tensor, nn

from cinemo.config import DiffusionConfig
from cinemo.diffusion.dct import dct_init
from cinemo.diffusion.ddim import Queries, ddim_invert_steps, ddim_steps, timesteps
from cinemo.diffusion.guidance import guided
from cinemo.diffusion.schedule import noise_schedule
from cinemo.methods import CinemoMethod, Method, build_method
from cinemo.methods.base import run
from cinemo.methods.cinemo import CinemoRecipe, CinemoSample
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig
from cinemo.recipes import override
from cinemo.types import Condition, InputError, LatentBatch

RECIPE = CinemoRecipe(
    name="test",
    model=UNetConfig(
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=1,
        addition_time_embed_dim=16,
    ),
)


@pytest.mark.golden
def test_golden_pipeline(say: Callable[[str], None]) -> None:
    tally = Tally("pipeline_tiny")
    for golden in map(Golden, golden_files("cinemo/pipeline_tiny*.npz")):
        with torch.device("meta"):
            unet = LavieUNet(**golden.meta["config"])
        fill_golden(unet)
        for dtype in (torch.float64, torch.float32):
            method = CinemoMethod(unet.to(dtype), noise_schedule(DiffusionConfig()), CinemoSample())
            for kind in ("sampling", "inversion"):
                for case in golden.meta.get(kind, []):
                    run_case(method, golden, kind, case, dtype, tally)
    tally.finish(say)


@torch.no_grad()
def run_case(method: CinemoMethod, golden: Golden, kind: str, case: dict, dtype: torch.dtype, tally: Tally) -> None:
    name, steps = case["name"], case["steps"]
    bucket = torch.tensor(case["bucket"], dtype=dtype).flatten().expand(case["batch"])
    base, text = golden.tensor(f"{name}.base_content", dtype), golden.tensor(f"{name}.text_cond", dtype)
    negative = golden.tensor(f"{name}.text_uncond", dtype) if golden.has(f"{name}.text_uncond") else None
    condition = Condition(image=base[:, :, 0], text=text, motion_bucket=bucket)
    branches = (Condition(condition, text=text if negative is None else negative), condition)
    x, solve = golden.tensor(f"{name}.x", dtype), ddim_steps if kind == "sampling" else ddim_invert_steps
    trajectory: list[Tensor] = []
    queries = recorded(solve(x, method.schedule, steps), trajectory)
    final = run(method, guided(queries, branches, (case["guidance"],), ready=method.ready))
    if dtype == torch.float32:
        tally.check(golden, name, "float32", final, "final_f32", FLOAT32)
        return
    # As in the DDIM goldens: the files' machine rounded sqrt(a_181) the other way.
    tolerance = FLOAT64 if 181 not in timesteps(method.schedule, steps) else 1e-7
    tally.check(golden, name, "float64", final, "final", tolerance)
    tally.check(golden, name, "float64", torch.stack(trajectory), "traj", tolerance)


def recorded(queries: Queries, trajectory: list[Tensor]) -> Queries:
    """The same queries; ``trajectory`` gets where each step led to."""
    x, t = next(queries)
    while True:
        output = yield x, t
        try:
            x, t = queries.send(output)
        except StopIteration as end:
            trajectory.append(end.value)
            return end.value
        trajectory.append(x)


def batch(seed: int = 0) -> tuple[LatentBatch, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(2, 4, 5, 4, 6, generator=generator)
    condition = Condition(
        image=video[:, :, 0],
        text=torch.randn(2, 7, 12, generator=generator),
        motion_bucket=torch.tensor([3.0, 15.0]),
    )
    return LatentBatch(video, condition), torch.tensor([10, 800]), torch.randn(2, 4, 4, 4, 6, generator=generator)


class Recorder(nn.Module):
    """A network that keeps what it was shown and answers with a known tensor."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer, self.dtype = answer, torch.float32

    def forward(self, sample: Tensor, t: Tensor, text: Tensor, motion: Tensor, deep: object = None) -> Tensor:
        self.seen = sample, t, text, motion
        return self.answer


def test_algorithm_1_line_by_line() -> None:
    data, t, noise = batch()
    answer = torch.randn_like(data.video_BCFHW)
    network = Recorder(answer)
    schedule = noise_schedule(RECIPE.diffusion)
    loss = CinemoMethod(network, schedule, RECIPE.sample)(data, t, noise)  # type: ignore[arg-type]

    z_1 = data.video_BCFHW[:, :, :1]
    a = schedule.alpha_bar[t].view(2, 1, 1, 1, 1)
    motion_t = a.sqrt() * (data.video_BCFHW[:, :, 1:] - z_1) + (1 - a).sqrt() * noise
    sample, seen_t, text, bucket = network.seen
    torch.testing.assert_close(sample, torch.cat([z_1, z_1 + motion_t], dim=2))
    assert torch.equal(seen_t, t)
    assert torch.equal(text, data.condition["text"])
    assert torch.equal(bucket, data.condition["motion_bucket"])
    torch.testing.assert_close(loss, (answer[:, :, 1:] - noise).square().mean())


def test_what_is_diffused_is_scaled_and_scaled_back() -> None:
    data, t, noise = batch()
    network = Recorder(torch.zeros_like(data.video_BCFHW))
    plain, scaled = (
        CinemoMethod(network, noise_schedule(DiffusionConfig(data_scale=scale)), RECIPE.sample)  # type: ignore[arg-type]
        for scale in (1.0, 2.5)
    )
    torch.testing.assert_close(scaled.target(data), 2.5 * plain.target(data))
    torch.testing.assert_close(scaled.finish(scaled.target(data), data.condition), data.video_BCFHW)
    scaled(data, t, noise)
    z_1 = data.video_BCFHW[:, :, :1]
    expected = scaled.schedule.add_noise(2.5 * (data.video_BCFHW[:, :, 1:] - z_1), noise, t)
    torch.testing.assert_close(network.seen[0], torch.cat([z_1, z_1 + expected], dim=2))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weighs_what_is_returned(prediction: str) -> None:
    torch.manual_seed(0)
    recipe = RECIPE.model_copy(update={"diffusion": DiffusionConfig(prediction=prediction)})
    method = build_method(recipe)
    each = method(*batch(), reduction="none")
    weighted = build_method(override(recipe, ["train.min_snr_gamma=5"]), method.networks)
    weights = method.schedule.min_snr_weights(batch()[1], 5.0)
    assert weights[0] < 0.1  # at step 10, where hardly any noise is left
    torch.testing.assert_close(weighted(*batch(), reduction="none"), each * weights)
    torch.testing.assert_close(weighted(*batch()), (each * weights).mean())


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_network_has_no_loss_and_gives_the_video_back(prediction: str) -> None:
    data, t, noise = batch()
    recipe = RECIPE.model_copy(update={"diffusion": DiffusionConfig(prediction=prediction)})
    method = build_method(recipe)
    motion = method.target(data)
    perfect = torch.cat([torch.zeros_like(motion[:, :, :1]), method.schedule.target(motion, noise, t)], dim=2)
    method.unet = Recorder(perfect)  # type: ignore[assignment]
    assert float(method(data, t, noise)) < 1e-12
    torch.testing.assert_close(method.finish(motion, data.condition), data.video_BCFHW)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    method = build_method(RECIPE)
    for parameter in method.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    method(*batch()).backward()
    unused = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"unet"}


def test_bf16_weights_and_fp16_latents_give_a_float32_loss() -> None:
    torch.manual_seed(0)
    data, t, noise = batch()
    method = build_method(RECIPE)
    expected = method(data, t, noise)
    half = LatentBatch(data.video_BCFHW.half(), data.condition.to(dtype=torch.float16))
    loss = method.bfloat16()(half, t, noise)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.slow
def test_training_learns_one_batch() -> None:
    torch.manual_seed(0)
    method = build_method(RECIPE)
    data, t, noise = batch()
    optimizer = torch.optim.Adam(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = method(data, t, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_start_is_dct_init_or_the_noise_itself() -> None:
    data, _, noise = batch()
    method = build_method(RECIPE)
    a = method.schedule.alpha_bar[975]
    expected = dct_init(data.condition["image"][:, :, None], noise, a, 0.23, "spatial")
    assert torch.equal(method.start(data.condition, noise), expected)
    without = build_method(RECIPE.model_copy(update={"sample": CinemoSample(dct_init=False)}), method.networks)
    assert torch.equal(without.start(data.condition, noise), noise)


def test_sampling_end_to_end_is_deterministic() -> None:
    torch.manual_seed(0)
    data, _, noise = batch()
    method: Method = build_method(RECIPE)

    def sample() -> Tensor:
        with torch.inference_mode():
            return run(method, method.sampling(data.condition, Condition(text=torch.zeros(2, 7, 12)), noise, 4, 7.5))

    video = sample()
    assert torch.equal(video, sample())
    assert torch.equal(video[:, :, 0], data.condition["image"])


def test_a_step_outside_the_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="dct_tau is 1000"):
        build_method(RECIPE.model_copy(update={"sample": CinemoSample(dct_tau=1000)}))
