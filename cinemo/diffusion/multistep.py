"""Fewer steps: DPM-Solver++ of second order (arXiv 2211.01095), as diffusers has it, as a generator of queries."""

from __future__ import annotations

from torch import Tensor

from cinemo.diffusion.ddim import Callback, Denoise, Queries, drive
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.types import InputError


def multistep_steps(x_T: Tensor, schedule: NoiseSchedule, steps: int, done: int = 0) -> Queries:
    """From noise to clean data: the queries of `multistep_sample`, arguments as there.

    ``done``: how many of the steps lie behind ``x_T``, which has the level of the next one; that one is of first order.
    """
    from diffusers import DPMSolverMultistepScheduler

    if not 2 <= steps < schedule.train_steps:
        raise InputError(f"steps is {steps}, expected 2..{schedule.train_steps - 1} for a multistep solver")
    if schedule.clean_scale is not None:
        raise InputError("solver multistep: x_0 is another at every step with dynamic_rescale; use solver ddim")
    # Pure noise (zero terminal SNR) has no log-SNR: it begins at the last step that holds a trace of signal.
    alpha_bar = schedule.alpha_bar[schedule.alpha_bar >= 2.0**-24]
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=len(alpha_bar),
        trained_betas=[float(1 - alpha_bar[0]), *betas.tolist()],
        prediction_type="epsilon" if schedule.prediction == "epsilon" else "v_prediction",
        final_sigmas_type="sigma_min",
        use_lu_lambdas=True,
    )
    solver.set_timesteps(steps)
    x = x_T
    for t in solver.timesteps.tolist()[done:]:
        # In x's dtype, or the solver's products with it would be rounded to the network's.
        output = (yield x, t).to(x.dtype)
        x = solver.step(output, t, x).prev_sample
    return x


def multistep_sample(
    denoise: Denoise, x_T: Tensor, schedule: NoiseSchedule, steps: int, callback: Callback | None = None
) -> Tensor:
    """From noise to clean data; arguments and result as `cinemo.diffusion.ddim.ddim_sample` without eta.

    Steps are spread evenly in log signal-to-noise, from T-1 to 0 (evenly in t, the last of 20 would bridge most of the
    noise range that matters), and the last level is a_0, as there. The arithmetic runs in
    float32 or the wider dtype of ``x_T``.
    """
    return drive(multistep_steps(x_T, schedule, steps), denoise, steps, callback)
