"""The recipe: everything that decides what a run computes, as frozen pydantic models. An unknown key is an error.

A machine's properties (how many nodes, which accelerator) are not here but in ``cluster/``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

MOTION_BUCKETS = 20
MAX_SHAPES = 64
Shape = tuple[int, int, int]
"""Of a sample in pixels: frames, height, width."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AUTO = "auto"
Count = Annotated[int, Field(ge=1)]
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


# Keys of `DataConfig` about the machines of a run, which leave no trace in what it makes.
MACHINES = ("decode_tasks", "encode_resource", "wait_for_nodes")


class DataConfig(Part):
    """How clips become latents (Cinemo section 4.1) and how latents become shards."""

    frames: int = Field(16, ge=2, description="frames per sample, including the first (given) one")
    size: tuple[int, int] = Field((320, 512), description="height and width in pixels")
    other_shapes: tuple[Shape, ...] = Field(
        (),
        description="further [frames, height, width] that samples may have beside frames and size: each clip has that "
        "of the nearest aspect ratio, of those the longest that it has frames for",
    )
    frame_interval: tuple[int, int] = Field((3, 10), description="smallest and largest frame interval, drawn uniformly")
    views: int = Field(1, ge=1, description="independently drawn samples per clip")
    clips_per_shard: int = Field(256, ge=1)
    seed: int = Field(0, description="seed of every random draw in precompute, keyed by clip id and view")
    decoder: Literal["pyav", "decord"] = "pyav"
    clip_timeout: float = Field(120.0, gt=0, description="seconds a clip may take to decode before it is refused")
    clip_memory: float = Field(4.0, gt=0, description="GiB of address space for the decoding process")
    ssim: Literal["luma", "rgb"] = Field("luma", description="metric of the motion score; rgb = kornia reference")
    scores: bool = Field(
        False, description="also store what spoils motion: cuts, bars, still overlays, hashes that find duplicates"
    )
    fields: tuple[Literal["text_states", "first_frame", "frames", "image_tokens", "frame_tokens", "flow"], ...] = Field(
        (), description="what else is stored with the latents, in separate tars; may be added to a finished dataset"
    )
    bucket_edges: tuple[Annotated[float, Field(ge=-1, le=1)], ...] = Field(
        tuple(round(k / MOTION_BUCKETS, 6) for k in range(1, MOTION_BUCKETS)),
        description="19 ascending SSIM values between buckets; the default is uniform (Cinemo section 3.2)",
    )
    max_quarantine_share: float = Field(1.0, ge=0, le=1, description="stop when a larger share of clips is refused")
    encode_batch: int = Field(1, ge=1, description="clips handed to an encoder at a time; each is encoded on its own")
    decode_cpus: float = Field(1.0, ge=1e-4, description="cores that one decoding process reserves")
    decode_resource: str | None = Field(
        None, description="Ray resource of the nodes that decode (one unit per core); null: wherever a core is free"
    )
    decode_tasks: int = Field(
        0, ge=0, description="decoding processes at most; 0: as many as the cluster has cores for, which may change"
    )
    encode_actors: int = Field(
        0, ge=0, description="encoder processes at most; 0: as many as the cluster has accelerators, or cores, for"
    )
    encode_gpus: float = Field(0.0, ge=0, le=1, description="share of an accelerator for each encoder process")
    encode_resource: str | None = Field(
        None, description="Ray resource of the nodes that encode (one unit per encoder); null: wherever there is room"
    )
    wait_for_nodes: float = Field(
        900.0,
        ge=0,
        description="seconds that a cluster has to add the accelerators or cores that are missing, for training too",
    )

    @property
    def together(self) -> bool:
        """Whether one process decodes, scores and encodes a clip: all of it is work for the same cores."""
        return not (self.encode_gpus or self.encode_actors or self.decode_resource or self.encode_resource)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All that samples may have; the recipe's own first."""
        return ((self.frames, *self.size), *self.other_shapes)

    @property
    def largest(self) -> Shape:
        """The shape of most pixels."""
        return max(self.shapes, key=math.prod)

    def of_shape(self, shape: Sequence[int]) -> DataConfig:
        """For samples of one (frames, height, width) alone."""
        frames, height, width = shape
        return self.model_copy(update={"frames": frames, "size": (height, width), "other_shapes": ()})

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        low, high = self.frame_interval
        if not 1 <= low <= high:
            raise ValueError(f"frame_interval is {self.frame_interval}, expected 1 <= low <= high")
        if min(self.size) < 8 or any(side % 8 for side in self.size):
            raise ValueError(f"size is {self.size}, expected multiples of 8 (the VAE halves it three times)")
        for frames, *size in self.other_shapes:
            if frames < 2 or min(size) < 8 or any(side % 8 for side in size):
                raise ValueError(
                    f"other_shapes has {[frames, *size]}, expected [frames, height, width]: at least 2, multiples of 8"
                )
        if len(set(self.shapes)) != len(self.shapes) or len(self.shapes) > MAX_SHAPES:
            raise ValueError(
                f"other_shapes is {self.other_shapes}, expected at most {MAX_SHAPES - 1} that differ from each other "
                f"and from frames and size, {self.shapes[0]}"
            )
        if len(self.bucket_edges) != MOTION_BUCKETS - 1 or sorted(set(self.bucket_edges)) != list(self.bucket_edges):
            raise ValueError(f"bucket_edges has {len(self.bucket_edges)} values, expected 19 strictly ascending ones")
        if len(set(self.fields)) != len(self.fields):
            raise ValueError(f"fields is {self.fields}, expected each at most once")
        return self


class EncodersConfig(Part):
    """Frozen networks. A location is ``package:NAME`` (shipped with cinemo), a directory, or ``s3://``."""

    vae: str = "package:tiny/vae"
    vae_decoder: str | None = Field(None, description="another VAE for decoding, e.g. SVD's temporal decoder")
    text_encoder: str = "package:tiny/text_encoder"
    tokenizer: str = "package:tiny/tokenizer"
    image_encoder: str | None = Field(None, description="CLIP's image model, for methods and fields that need it")
    flow: str | None = Field(
        None, description="weights of torchvision's RAFT, large or small, for the field flow; null: OpenCV's DIS"
    )
    latent: Literal["sample", "mode"] = Field(
        "sample", description="the published code draws a sample from the posterior"
    )
    normalize: bool = Field(
        False,
        description="train on channels of mean 0 and deviation 1, as precompute measured them on the dataset; "
        "false: with the autoencoder's own scaling, as published",
    )
    latents_mean: tuple[float, ...] | None = Field(
        None,
        description="mean of each stored channel; with normalize, train.py takes it and latents_std from the dataset",
    )
    latents_std: tuple[float, ...] | None = Field(None, description="deviation of each stored channel")

    @model_validator(mode="after")
    def _check(self) -> EncodersConfig:
        mean, deviation = self.latents_mean, self.latents_std
        if (mean is None) != (deviation is None) or len(mean or ()) != len(deviation or ()):
            raise ValueError("latents_mean and latents_std: expected both, one number for each latent channel")
        if min(deviation or (1.0,)) <= 0:
            raise ValueError(f"latents_std is {deviation}, expected numbers above 0")
        return self

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, deviation) of each stored latent channel where training normalises by them."""
        if not self.normalize or self.latents_mean is None or self.latents_std is None:
            return None
        return self.latents_mean, self.latents_std


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


# Keys that came later: a recipe's file leaves them out where nobody changed them, so that bundles keep their digests.
_LATER = {
    "sample": ("long",),
    "encoders": ("flow",),
    "train": (
        "grow",
        "where",
        "max_skipped_steps",
        "skip_steps",
        "skip_samples",
        "tf32",
        "deepspeed",
        "optimizer",
        "tensorboard",
        "posthoc_ema",
        "posthoc_snapshots",
        "text_states",
        "checkpoint_minutes",
        "stop_file",
        "resource",
    ),
    "data": (*MACHINES, "scores", "other_shapes"),
}


class Recipe(Part):
    """A complete run. Built by a function in `cinemo.recipes`, changed with ``--set dotted.key=value``.

    Each method has a type of recipe of its own (`cinemo.methods.base.Method.recipe_type`), whose ``model``, and where
    it needs them ``train`` and ``sample``, have the keys of that method.
    """

    name: str
    method: str = Field(description="a method of cinemo.methods, or package.module:Class of one elsewhere")
    compile: bool | Literal["regional"] = Field(
        False,
        description="torch.compile the network, in training and sampling; regional: each kind of block once, which "
        "takes a fraction of the time",
    )
    data: DataConfig = DataConfig()
    encoders: EncodersConfig = EncodersConfig()
    model: SerializeAsAny[Part] = Part()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: SerializeAsAny[TrainConfig] = TrainConfig()
    sample: SerializeAsAny[SampleConfig] = SampleConfig()

    @model_validator(mode="after")
    def _takes_every_shape(self) -> Self:
        for shape in self.data.other_shapes:
            try:
                type(self).model_validate(self.of_shape(shape).model_dump())
            except ValidationError as error:
                message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                raise ValueError(f"data.other_shapes has {list(shape)}: {message}") from None
        return self

    def of_shape(self, shape: Sequence[int]) -> Self:
        """For samples of one (frames, height, width) alone."""
        return self.model_copy(update={"data": self.data.of_shape(shape)})

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        sample, steps = self.sample, self.diffusion.train_steps
        least = 2 if sample.solver == "multistep" else 1
        most = steps - (sample.spacing == "leading")
        if not least <= sample.steps <= most:
            raise ValueError(
                f"sample.steps is {sample.steps}, expected {least}..{most} with diffusion.train_steps {steps}, "
                f"solver {sample.solver} and spacing {sample.spacing}"
            )
        return self

    @property
    def toy(self) -> bool:
        """Whether its videos are too small for anything but to see the method work."""
        return min(self.data.size) < 128

    def with_lanes(self) -> Self:
        """With the number that ``train.lanes`` = null stands for, which a checkpoint keeps whatever the default is."""
        lanes = {"lanes": self.train.reading_lanes}
        return self.model_copy(update={"train": self.train.model_copy(update=lanes)})

    def to_json(self) -> str:
        exclude = {
            section: {name for name in names if getattr(part, name) == type(part).model_fields[name].default}
            for section, names in _LATER.items()
            for part in [getattr(self, section)]
        }
        content = self.with_lanes().model_dump(mode="json", exclude=exclude)
        # As the switch it was, so that a recipe that has not changed is the same file.
        checkpointing = content["train"]["gradient_checkpointing"]
        content["train"]["gradient_checkpointing"] = {"none": False, "whole": True}.get(checkpointing, checkpointing)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a type of recipe."""
    names = []
    for name, info in model.model_fields.items():
        part = info.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            names += keys(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
