"""The published sampler of DynamiCrafter: schedules, guidance, single steps and whole loops of the official code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Family
from torch import Tensor

from cinemo.config import DiffusionConfig
from cinemo.diffusion.ddim import Spacing, ddim_sample, ddim_step, timesteps
from cinemo.diffusion.guidance import combined, needed
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule, without_last_signal

SPACINGS: dict[str, Spacing] = {"uniform": "leading", "uniform_trailing": "trailing"}
PREDICTIONS = {"eps": "epsilon", "v": "v"}


def schedule_of(meta: dict[str, Any]) -> NoiseSchedule:
    return noise_schedule(
        DiffusionConfig(
            beta_start=meta.get("linear_start", 0.00085),
            beta_end=meta.get("linear_end", 0.012),
            beta_schedule="scaled_linear",
            prediction=PREDICTIONS[meta["param"]],
            zero_terminal_snr=meta["zero_snr"],
            dynamic_rescale=meta["base_scale"] if meta.get("dynamic_rescale") else None,
        )
    )


@pytest.mark.golden
def test_golden_schedules(say: Callable[[str], None]) -> None:
    family = Family("dc_schedule")
    for where, meta, arrays in family:
        schedule = schedule_of(meta)
        family.check(where, "levels", schedule.alpha_bar, arrays["alphas_cumprod_f32"], 1e-6)
        stretched = without_last_signal(torch.from_numpy(arrays["alphas_cumprod64"]))
        family.check(where, "zero snr", stretched, arrays["alphas_cumprod_zero_snr64"], 1e-12)
        for name in (name.removesuffix("_steps") for name in arrays if name.endswith("_steps")):
            spacing, count = name.rsplit("_", 1)
            visited = timesteps(schedule, int(count), SPACINGS[spacing])[::-1]
            # Where they do not divide, the official code makes one step too many: 31 for 30.
            kept = len(visited)
            np.testing.assert_array_equal(visited, arrays[f"{name}_steps"][:kept])
            below = [0, *visited[:-1]]
            family.check(where, "levels", schedule.alpha_bar[visited], arrays[f"{name}_alphas"][:kept], 1e-6)
            family.check(where, "levels", schedule.alpha_bar[below], arrays[f"{name}_alphas_prev"][:kept], 1e-6)
            # The fresh noise of a step is what is left of x where neither data nor predicted noise are.
            ones = torch.ones(1, dtype=torch.float64)
            sigmas = []
            for t, t_below in zip(visited, [None, *visited[:-1]], strict=True):
                still, moved = (
                    ddim_step(schedule, 0 * ones, 0 * ones, t, t_below, 1.0, f)[0] for f in (0 * ones, ones)
                )
                sigmas.append(float(moved - still))
            family.check(where, "sigma", sigmas, arrays[f"{name}_sigmas_eta1"][:kept], 1e-6)
        x_0, noise, t = (torch.from_numpy(arrays[name]) for name in ("x0", "noise", "t"))
        x_t = schedule.add_noise(x_0, noise, t)
        family.check(where, "noised", x_t, arrays["xt"], 1e-6)
        as_v = NoiseSchedule(schedule.alpha_bar, "v")
        family.check(where, "v", as_v.target(x_0, noise, t), arrays["v"], 1e-6)
        back, noise_back = as_v.predict_x0_eps(x_t, as_v.target(x_0, noise, t), t)
        family.check(where, "split", back, arrays["x0_from_v"], 1e-6)
        family.check(where, "split", noise_back, arrays["eps_from_v"], 1e-6)
        if "x0_from_eps" in arrays:
            back, _ = NoiseSchedule(schedule.alpha_bar).predict_x0_eps(x_t, noise, t)
            # Divided by sqrt(a), which is 0.07 at the end.
            family.check(where, "x_0 from noise", back, arrays["x0_from_eps"], 2e-5)
    family.finish(say)


@pytest.mark.golden
def test_golden_guidance_rescale(say: Callable[[str], None]) -> None:
    family = Family("dc_guidance_rescale")
    for where, meta, arrays in family:
        guided, conditional = torch.from_numpy(arrays["cfg"]), torch.from_numpy(arrays["cond"])
        for phi in meta["phis"]:
            # Scale 2 makes of both branches what the file says was guided: 2 o_1 - o_0.
            branches = torch.cat([2 * conditional - guided, conditional])
            family.check(where, "rescaled", combined(branches, (2.0,), phi), arrays[f"out_{phi}"], 2e-6)
    family.finish(say)


def scales_of(meta: dict[str, Any]) -> tuple[float, float]:
    """Of the image and of the text, that of the image being the text's where there is none."""
    return (meta["s_txt"] if meta["s_img"] is None else meta["s_img"]), meta["s_txt"]


@pytest.mark.golden
def test_golden_single_steps(say: Callable[[str], None]) -> None:
    family = Family("dc_cfg_step")
    for where, meta, arrays in family:
        schedule, scales = schedule_of(meta), scales_of(meta)
        branches = [torch.from_numpy(arrays[f"e_{name}"]) for name in ("uncond", "img", "cond")]
        kept, between = needed(scales)
        assert len(kept) == (2 if scales[0] == scales[1] else 3)
        chosen = torch.cat([branches[branch] for branch in kept])
        family.check(where, "guided", combined(chosen, between), arrays["combined_before_rescale"], 5e-5)
        visited = timesteps(schedule, meta["steps"], SPACINGS[meta["spacing"]])[::-1]
        np.testing.assert_array_equal(visited, arrays["ddim_timesteps"])
        index = meta["index"]
        t, below = visited[index], visited[index - 1] if index else None
        assert arrays["t"].tolist() == [t] * len(arrays["x"])
        output = combined(chosen, between, meta["guidance_rescale"])
        x, noise = (torch.from_numpy(arrays[name]) for name in ("x", "noise"))
        x_below, x_0 = ddim_step(schedule, x, output, t, below, meta["eta"], noise)
        # At the last step of zero terminal SNR, 1 - a - sigma^2 is 0 but for rounding.
        exact = not (meta["zero_snr"] and t == 999)
        family.check(where, "x_0", x_0, arrays["pred_x0"], 3e-4)
        family.check(where, "x", x_below, arrays["x_prev"], 5e-5 if exact else 2e-3)
    family.finish(say)


@pytest.mark.golden
def test_golden_loops(say: Callable[[str], None]) -> None:
    family = Family("dc_ddim_loop")
    for where, meta, arrays in family:
        schedule, (kept, between) = schedule_of(meta), needed(scales_of(meta))
        predictors = [_analytic(*meta["abph"][name]) for name in ("unc", "img", "cond")]

        def denoise(x: Tensor, t: int, on: Any = (kept, between, predictors, meta["guidance_rescale"])) -> Tensor:
            kept, between, predictors, rescale = on
            return combined(torch.cat([predictors[branch](x, t) for branch in kept]), between, rescale)

        x_T = torch.from_numpy(arrays["x_T"])
        got = ddim_sample(denoise, x_T, schedule, meta["steps"], meta["eta"], spacing=SPACINGS[meta["spacing"]])
        family.check(where, "result", got, arrays["out"], 5e-5)
    family.finish(say)


def _analytic(a: float, b: float, phase: float) -> Callable[[Tensor, int], Tensor]:
    return lambda x, t: a * x + b * float(np.cos(0.01 * t + phase)) * torch.tanh(x + 0.3)
