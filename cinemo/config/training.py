"""A training: its optimisation, what is remembered of it, its workers and memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from cinemo.config.part import Count, Part

AUTO = "auto"
Checkpointing = Literal["none", "selective", "whole"]
"""How much of a training's forward pass is computed again in its backward pass instead of kept."""
Stage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]


class Setting(NamedTuple):
    """What decides time and memory of a training step, and no result: see `TrainConfig.setting`."""

    micro_batch: int
    gradient_checkpointing: Checkpointing
    zero_stage: Stage
    offload: Offload


def _checkpointing(value: Any) -> Any:
    """Recipes of earlier versions had a switch."""
    return {True: "whole", False: "none"}[value] if isinstance(value, bool) else value


def _derived(value: Any) -> Any:
    """Recipes of earlier versions had null where nothing is set."""
    return {} if value is None else value


# A lane has one shard open and the next one coming, each about 84 MB in the paper's shape (256 clips). So 8 lanes are
# 1.3 GB of the cache on a node that reads them all, and 0.7 GB from S3 before the first step; one lane for each of 80
# samples would be 13 GB and 6.7 GB. More workers than lanes share them, neighbours with neighbours: on one node from
# one copy; a lane that two nodes share is fetched by both.
MOST_LANES = 8


class DeepspeedConfig(Part):
    """Communication of DeepSpeed's ZeRO by its own names; null: derived (`cinemo.training.run.engine`).

    Not ``round_robin_gradients``: with it DeepSpeed 0.19 does not say where a parameter's float32 weights lie.
    """

    overlap_comm: bool | None = Field(None, description="reduce gradients while the backward pass goes on")
    reduce_bucket_size: int | None = Field(None, ge=1, description="values reduced at a time")
    allgather_bucket_size: int | None = Field(None, ge=2, multiple_of=2, description="values gathered at a time")
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0, description="values gathered ahead of their use")
    stage3_param_persistence_threshold: int | None = Field(None, ge=0, description="tensors below it stay whole")

    def check(self, zero_stage: int) -> None:
        """See that what is set has a meaning at a stage.

        Raises:
            ValueError: something has none.
        """
        for key in self.model_dump(exclude_none=True):
            stages: tuple[int, ...] = (3,) if key.startswith("stage3_") else (1, 2, 3)
            stages = (1, 2) if key == "allgather_bucket_size" else stages
            if zero_stage not in stages:
                among = " or ".join(map(str, stages))
                raise ValueError(f"deepspeed.{key} is set with zero_stage {zero_stage}, expected zero_stage {among}")


class TrainConfig(Part):
    """Optimisation (Cinemo section 4.1) and the shape of the worker group."""

    workers: int = Field(8, ge=1)
    cpus_per_worker: float = Field(1, ge=0)
    gpus_per_worker: float = Field(0, ge=0, le=1, multiple_of=1, description="1: each rank drives a device of its own")
    resource: str | None = Field(
        None, description="Ray resource of the nodes that train (one unit per worker); null: wherever there is room"
    )
    global_batch: int = Field(80, ge=1)
    micro_batch: Count | Literal["auto"] = Field(
        10,
        description="samples a worker holds at once; the rest of its batch is accumulated. auto, of this and the other "
        "keys that know it: the fastest that fits the accelerator, by train.py --plan's model",
    )
    max_steps: int = Field(100_000, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, description="0 is the paper's Adam; above 0 it is AdamW")
    grad_clip: float = Field(1.0, ge=0, description="0 switches clipping off")
    prompt_dropout: float = Field(0.5, ge=0, le=1, description="share of samples whose prompt is empty")
    text_states: Literal["auto", "stored", "encoded"] = Field(
        "auto",
        description="stored: read from the dataset's field text_states, so that no text encoder is loaded; encoded: "
        "made in training; auto: stored where all datasets have them of this recipe's text encoder",
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="min-SNR loss weights (arXiv 2303.09556, which uses 5); null: none"
    )
    timestep_shift: float = Field(
        1.0,
        gt=0,
        description="above 1, timesteps are drawn closer to pure noise (arXiv 2403.03206, eq. 23); 1: uniformly",
    )
    timestep_shift_steps: int | None = Field(
        None,
        ge=0,
        description="training steps that use timestep_shift; timesteps are uniform after them; null: all steps",
    )
    noise_offset: float = Field(
        0.0, ge=0, description="size of extra noise that has one value for all frames and cells of a channel"
    )
    trainable: Literal["all", "temporal", "lora"] = Field(
        "all", description="what is trained: all, as in the paper; temporal: attention along time and the motion input"
    )
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float | None = Field(
        None, gt=0, description="null: equal to lora_rank, so that the update is not scaled"
    )
    lora_layers: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="linear layers to adapt, by the endings of their names",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of averaged weights, which sample sheets show and export.py takes; 0: none",
    )
    posthoc_ema: tuple[Annotated[float, Field(ge=0.005, le=0.28)], ...] = Field(
        (),
        description="relative widths of two further averages, e.g. [0.05,0.1], from whose snapshots export.py "
        "--ema-std makes an average of another width (arXiv 2312.02696)",
    )
    posthoc_snapshots: int = Field(
        32, ge=2, description="snapshots of posthoc_ema that are kept at most, evenly spread over max_steps"
    )
    zero_stage: Literal[0, 1, 2, 3, "auto"] = Field(
        2, description="how much of weights and states workers share, or auto"
    )
    offload: Offload = Field(
        "none", description="what is kept in host memory: the optimizer (ZeRO 1-3), or the weights too (all, ZeRO 3)"
    )
    deepspeed: Annotated[DeepspeedConfig, BeforeValidator(_derived)] = DeepspeedConfig()
    optimizer: Literal["adam", "adam8bit"] = Field(
        "adam", description="adam8bit: moments of a byte a value (needs the package bitsandbytes)"
    )
    precision: Literal["fp32", "bf16"] = "bf16"
    tf32: bool = Field(True, description="float32 products on tensor cores, where an accelerator has them")
    gradient_checkpointing: Annotated[
        Literal["none", "selective", "whole", "auto"],
        BeforeValidator(_checkpointing),
    ] = Field(
        "none",
        description="what is computed twice to save activation memory: none; selective, the cheaper parts of "
        "transformers; whole, every layer, for a third more time; or auto",
    )
    init: str | None = Field(
        None,
        description="what to start from: LaVie's file, a Cinemo folder or bundle, a UNet's folder; local, package:NAME "
        "or s3://; null: from scratch",
    )
    seed: int = 0
    lanes: int | None = Field(
        None,
        ge=1,
        description="reading lanes of the canonical order, which divide global_batch: as many shards are half read at "
        f"once, and in a batch; null: the most that divide it, up to {MOST_LANES}",
    )
    on_damaged: Literal["stop", "skip"] = Field("stop", description="what to do about a missing or damaged shard")
    cache_gb: float = Field(20.0, gt=0, description="GB of disk per node for cached shards of an s3:// dataset")
    max_skipped_steps: int = Field(
        10,
        ge=1,
        description="steps in a row whose gradient is not finite, and which therefore move no weights, before the run "
        "stops",
    )
    skip_steps: tuple[Annotated[str, Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")], ...] = Field(
        (), description="steps to pass over, as reports count them: 1203-1210; the same as --skip-steps"
    )
    skip_samples: tuple[str, ...] = Field(
        (), description="ids of samples to leave out, as the sample log has them; the same as --skip-sample"
    )
    held_out_shards: int = Field(
        0, ge=0, description="shards at the end of the index, used for the validation loss alone"
    )
    where: str | None = Field(
        None, description="which samples are seen, by what is stored of them, e.g. ssim < 0.98; the same as --where"
    )
    grow: bool = Field(
        True,
        description="use what the dataset gains while it is trained on (precompute.py --append), from the next epoch "
        "on; false: what the run began with",
    )
    validate_every: int = Field(1000, ge=0, description="steps between validation losses; 0: only at the end")
    canary: int = Field(2, ge=0, description="samples made again and compared before step 0, where their sources exist")
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    checkpoint_minutes: float = Field(
        30.0,
        ge=0,
        description="minutes after a checkpoint until the next one, where its steps take longer; 0: no limit",
    )
    stop_file: str | None = Field(
        None, description="a local path: once a file is there on any node, the run saves and ends, as after SIGTERM"
    )
    keep_checkpoints: int = Field(3, ge=1)
    sample_every: int = Field(1000, ge=0, description="steps between sample contact sheets; 0 = only at the end")
    sample_count: int = Field(
        2, ge=0, description="samples of the dataset on a sheet, beside what train.py --validation names"
    )
    tensorboard: bool = Field(
        False, description="write curves and sample sheets for TensorBoard too; the same as --tensorboard"
    )
    max_failures: int = Field(3, ge=-1, description="worker-group restarts before the run fails; -1 = no limit")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        micro_batch = 1 if self.micro_batch == "auto" else self.micro_batch
        if self.global_batch % (self.workers * micro_batch):
            raise ValueError(
                f"global_batch is {self.global_batch}, expected a multiple of workers x micro_batch = "
                f"{self.workers} x {self.micro_batch}"
            )
        if self.lanes is not None and self.global_batch % self.lanes:
            raise ValueError(
                f"lanes is {self.lanes}, expected a divisor of global_batch ({self.global_batch}); "
                "train.lanes=null takes one"
            )
        for steps in self.skip_steps:
            first, _, last = steps.partition("-")
            if int(last or first) < int(first):
                raise ValueError(f"skip_steps has {steps}, expected FIRST-LAST with FIRST <= LAST")
        if self.posthoc_ema and (len(self.posthoc_ema) != 2 or self.posthoc_ema[0] >= self.posthoc_ema[1]):
            raise ValueError(f"posthoc_ema is {list(self.posthoc_ema)}, expected two ascending widths, or []")
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage != "auto" and self.zero_stage < least:
            raise ValueError(
                f"offload is {self.offload} with zero_stage {self.zero_stage}, expected zero_stage {least} or more; "
                f"set train.zero_stage={max(2, least)} or train.offload=none"
            )
        if self.zero_stage != "auto":
            self.deepspeed.check(self.zero_stage)
        if self.optimizer == "adam8bit" and (self.ema_decay or self.posthoc_ema):
            raise ValueError(
                f"ema_decay is {self.ema_decay:g} and posthoc_ema {list(self.posthoc_ema)} with optimizer adam8bit, "
                "expected 0 and []: only adam keeps averaged weights"
            )
        return self

    @property
    def automatic(self) -> tuple[str, ...]:
        """The keys that are auto."""
        return tuple(key for key in Setting._fields if getattr(self, key) == AUTO)

    @property
    def setting(self) -> Setting:
        """
        Raises:
            ValueError: some of it is auto and not chosen yet.
        """
        micro_batch, checkpointing, stage = self.micro_batch, self.gradient_checkpointing, self.zero_stage
        if micro_batch == "auto" or checkpointing == "auto" or stage == "auto":
            raise ValueError(f"train.{', train.'.join(self.automatic)}: auto was not replaced by what it stands for")
        return Setting(micro_batch, checkpointing, stage, self.offload)

    @property
    def reading_lanes(self) -> int:
        """``lanes``, or those that null stands for."""
        return self.lanes or max(lanes for lanes in range(1, MOST_LANES + 1) if self.global_batch % lanes == 0)
