"""The noise schedule, and how videos are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cinemo.config.part import Part


class DiffusionConfig(Part):
    """Noise schedule. LaVie and Cinemo: linear betas, epsilon prediction."""

    train_steps: int = Field(1000, ge=2)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    prediction: Literal["epsilon", "v"] = "epsilon"
    data_scale: float = Field(
        1.0, gt=0, description="factor on the data before diffusion; the inverse of its deviation gives unit energy"
    )
    zero_terminal_snr: bool = Field(
        False, description="leave no signal at the last step (arXiv 2305.08891); needs prediction v"
    )
    dynamic_rescale: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor on the clean data from step 400 on; it is 1 at step 0 (DynamiCrafter's code)",
    )

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start is {self.beta_start}, expected at most beta_end = {self.beta_end}")
        if self.zero_terminal_snr and self.prediction != "v":
            raise ValueError(
                "zero_terminal_snr is true with prediction epsilon, expected v: noise alone says nothing about the data"
            )
        return self


class LongConfig(Part):
    """A video of more frames than the network makes at once (`cinemo.diffusion.phased`, `cinemo.methods.long`).

    ``pipelines/evaluate.py --long`` compares the ways (BENCHMARKS.md has a table): segments of phased videos begin
    where the first one did, which shows; windows that share half of their frames show least.
    """

    way: Literal["phased", "windows", "chain"] = Field(
        "windows",
        description="phased: segments share the first steps (arXiv 2405.17306); windows: they overlap, and are blended "
        "in every step; chain: each begins with the last frame of the one before",
    )
    gamma: float = Field(0.8, gt=0, le=1, description="phased: share of the steps that segments have in common")
    omega: float = Field(0.2, ge=0, description="phased: how much noise of its own a segment gets")
    shuffle: Literal["sequence", "segment"] = Field(
        "sequence", description="phased: frames of the noise change places over all segments, or within each"
    )
    noise: Literal["handoff", "image"] = Field(
        "handoff", description="phased: as the first segment had it, or as the network finds it in a standing picture"
    )
    renormalise: bool = Field(False, description="phased: bring the noise of further segments back to its deviation")
    overlap: int = Field(8, ge=0, description="windows: frames that neighbours share, at most half of them")
    together: int = Field(4, ge=1, description="segments or windows in one call of the network: bounds the memory")


class SampleConfig(Part):
    """Sampling defaults of any method; one with more of its own derives from this."""

    steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=1)
    fps: float = Field(8, gt=0)
    solver: Literal["ddim", "multistep"] = Field("ddim", description="multistep: DPM-Solver++, for about 20 steps")
    eta: float = Field(0.0, ge=0, le=1, description="fresh noise in each DDIM step; 0: none, 1: as much as DDPM")
    spacing: Literal["leading", "trailing"] = Field(
        "leading", description="DDIM steps: leading ends at 1 (of 1000, 50 steps begin at 981), trailing begins at 999"
    )
    final_level: Literal["a_0", "clean"] = Field(
        "a_0", description="where the last DDIM step goes: step 0, or no noise"
    )
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="how far to bring guided outputs back to the deviation of unguided ones"
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="part of the noise range in which guidance acts"
    )
    reuse_features: int = Field(1, ge=1, description="run the inner layers at every Nth step only (DeepCache)")
    long: LongConfig = LongConfig()

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is {self.guidance_interval}, expected 0 <= low <= high <= 1")
        if self.solver != "ddim" and (self.eta, self.spacing, self.final_level) != (0.0, "leading", "a_0"):
            raise ValueError(f"eta, spacing and final_level apply to solver ddim only, got them with {self.solver}")
        return self
