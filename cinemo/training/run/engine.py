"""DeepSpeed behind a small wrapper: its settings derived from the recipe, optimiser, schedule, checkpoints.

DeepSpeed's JSON is never written by hand: `deepspeed_config` derives it from `cinemo.config.TrainConfig` and whether
the workers are on several nodes. The optimiser
is torch's own Adam, handed in (DeepSpeed's would be built first, also for offload), and no extension is ever compiled:
the only one training would load on a CPU serves an inference collective that training never calls.

Checkpoints are our own files (`cinemo.training.checkpoint.shares`): any number of workers and any ZeRO stage reads
them.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cinemo.config import TrainConfig
from cinemo.methods import Method
from cinemo.training.checkpoint import shares
from cinemo.training.checkpoint.partitions import Partitions
from cinemo.training.run.averaging import AveragingAdam
from cinemo.training.run.profiler import BACKWARD, OPTIMIZER, span
from cinemo.types import LatentBatch

# Values that ZeRO reduces at once; DeepSpeed's 500 million are half of the full-size network: 2 GB of every process.
# Across nodes a collective takes longer to begin, and a ring over many ranks is fast only with long messages: twice.
REDUCE_BUCKET = 50_000_000
# For the same reason ZeRO 3 keeps the smaller matrices whole there (of the paper's UNet 189 of 346, 8% of the weights),
# and asks for more of the next weights at a time.
_GATHERED_ACROSS_NODES = {"stage3_param_persistence_threshold": 1_000_000, "stage3_prefetch_bucket_size": 100_000_000}


def deepspeed_config(train: TrainConfig, across_nodes: bool = False) -> dict[str, Any]:
    """The DeepSpeed settings of a recipe. Accumulation fills the global batch: global / (workers x micro).

    Under ZeRO 2 and 3, gradients of bfloat16 weights are added up in float32, under 1 to 3 they are reduced in it.

    Args:
        across_nodes: whether the workers are on several.
    """
    micro_batch, _, stage, _ = train.setting
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}
    if train.gpus_per_worker and stage:
        # Gradients travel while the backward pass goes on, which takes buckets that fill many times in it.
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
        if across_nodes:
            zero |= {
                "reduce_bucket_size": 2 * REDUCE_BUCKET,
                **(_GATHERED_ACROSS_NODES if stage == 3 else {}),
            }
    host = {"device": "cpu", "pin_memory": train.gpus_per_worker > 0}
    if train.offload != "none":
        zero["offload_optimizer"] = host
    if train.offload == "all":
        zero["offload_param"] = host
    zero |= train.deepspeed.model_dump(exclude_none=True)
    wide: dict[str, Any] = {}
    if train.precision == "bf16" and stage:
        wide["communication_data_type"] = "fp32"
        if stage >= 2:  # stage 1 would get another optimiser wrapper by it
            wide["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation(train),
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # Adam with averages is one
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
        **wide,
        "steps_per_print": sys.maxsize,
    }


def accumulation(train: TrainConfig) -> int:
    """Micro batches per worker and step."""
    return train.global_batch // (train.workers * train.setting.micro_batch)


def parameter_groups(method: Method, train: TrainConfig) -> list[dict[str, Any]]:
    """What learns, by learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(method.learning_rate(name, train), []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def optimizer(
    train: TrainConfig, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Adam (Cinemo section 4.1); weight decay is AdamW's, apart from the gradient; averages of the weights too,
    where there are any.
    """
    if train.optimizer == "adam8bit":
        from cinemo.training.run.adam8bit import Adam8bit  # late: its library may be absent

        return Adam8bit(parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    # Fused: one pass over the weights instead of a dozen.
    settings: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "fused": True}
    if train.weight_decay:
        settings |= {"weight_decay": train.weight_decay, "decoupled_weight_decay": True}
    if train.ema_decay or train.posthoc_ema:
        return AveragingAdam(parameters, train.ema_decay or None, train.posthoc_ema, **settings)
    return torch.optim.Adam(parameters, **settings)


def lr_factor(train: TrainConfig, step: int) -> float:
    """The factor on ``train.lr`` in optimiser step ``step`` (0 = the first): warm-up, then flat or half a cosine."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Engine:
    """A method under DeepSpeed on this rank. Every rank makes every call.

    Needs an initialised torch process group (Ray Train makes one) of ``train.workers`` ranks.

    Args:
        across_nodes: whether they are on several.
    """

    def __init__(self, method: Method, train: TrainConfig, device: torch.device, across_nodes: bool = False) -> None:
        deepspeed = import_deepspeed(device.type)
        if train.tf32 and device.type == "cuda":
            allow_tf32()
        self.device, self.train = device, train
        self.dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._micro, self._micros = 0, accumulation(train)
        self._norm: Tensor | float | None = None
        self.moved = True  # whether the last optimizer step moved the weights: its gradient was finite, on every rank
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # Ray Train sets it; DeepSpeed insists on it
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        method.to(device)
        for name, parameter in method.named_parameters():
            if parameter.dim() == 0:
                raise TypeError(f"{name} has no dimension, which DeepSpeed cannot broadcast; give it the shape (1,)")
        self._adam = optimizer(train, parameter_groups(method, train))
        self._adam.register_step_pre_hook(_without_gradients)
        self._engine, _, _, self._schedule = deepspeed.initialize(
            model=method,
            optimizer=self._adam,
            lr_scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: lr_factor(train, step)),
            config=deepspeed_config(train, across_nodes),
            dist_init_required=False,
        )
        if train.zero_stage == 0 and train.precision == "bf16":
            # DeepSpeed's wrapper of this pair lets Adam do a step on zero gradients when it is built: the bias
            # corrections would be those of one step later for good, and weight decay has been applied once.
            self._adam.state.clear()
            self._engine.optimizer.refresh_fp32_params()
            # It also looks at every gradient on its own, and waits for the device each time.
            self._engine.optimizer.overflow_checker.has_overflow_serial = _not_finite
        self._partitions = Partitions(self._engine, self._adam, train.setting.zero_stage, self.rank, self.world)

    @property
    def method(self) -> nn.Module:
        """The wrapped method. Under ZeRO-3 its parameters are whole only inside a forward pass that all ranks make."""
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def sharded(self) -> bool:
        """Whether a forward pass of the method needs every rank."""
        return self.train.zero_stage == 3

    @property
    def lr(self) -> float:
        """The learning rate of the next optimiser step: of the first parameters, where a method has several."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def grad_norm(self) -> float:
        """The gradient norm of the last optimiser step that moved weights, before clipping. Waits for the device."""
        return float("nan") if self._norm is None else float(self._norm)

    def loss(self, batch: LatentBatch, t_B: Tensor, noise_BCFHW: Tensor) -> Tensor:
        """The method's loss of each sample of a micro batch (B,)."""
        return self._engine(batch, t_B, noise_BCFHW, reduction="none")  # type: ignore[no-any-return]

    def step(self, loss: Tensor) -> None:
        """Backward of one micro batch's scalar loss; the last one of a step also moves the weights and the schedule,
        unless its gradient is not finite on some rank (`moved`).
        """
        with span(BACKWARD):
            self._engine.backward(loss)
        self._micro = (self._micro + 1) % self._micros
        norm = None
        if self._micro == 0 and self.train.zero_stage == 0 and self.train.precision == "fp32":
            # Plain data parallel has no optimiser wrapper that would keep the norm and look at it; the gradients are
            # reduced by now, so that every rank sees the same.
            norm = nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])
            self._adam.overflow = not bool(norm.isfinite())  # type: ignore[attr-defined]  # DeepSpeed asks for it
        with span(OPTIMIZER):
            self._engine.step()
        if self._micro == 0:
            self.moved = self._engine.was_step_applied()
            if self.moved:
                self._norm = self._engine.get_global_grad_norm() if norm is None else norm

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a tensor of the same shape on each."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values = values / self.world
        return values

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, on every rank."""
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network has averaged weights, where there are any. Not between backward passes of one step."""
        return self._partitions.averaged()

    @property
    def share_bytes(self) -> int:
        """What `save` writes on this rank."""
        return self._partitions.written_bytes

    def snapshot(self, client_state: dict[str, Any], memory: shares.Memory | None = None) -> shares.Snapshot:
        """This rank's share as it is now (rank 0: the record with ``client_state`` too), to be written later.

        Frozen parameters are in it as well, so that a checkpoint needs nothing beside it.

        Args:
            client_state: JSON values.
            memory: what to copy into, see `shares.Snapshot`.
        """
        schedule = self._schedule.state_dict()["last_epoch"]
        record = {"adam_steps": self._partitions.steps, "schedule_steps": schedule, "client": client_state}
        return shares.Snapshot(self.rank, self._partitions.written(), None if self.rank else record, memory)

    def save_averages(self, directory: Path, keys: Sequence[str], dtype: torch.dtype) -> int:
        """Write this rank's share of some averages under ``directory``, in ``dtype``; returns the optimiser's steps."""
        shares.write(directory, self.rank, self._partitions.written(keys), dtype)
        return self._partitions.steps

    def load(self, directory: Path) -> dict[str, Any]:
        """Take up weights, optimiser, schedule and ``client_state`` from a complete checkpoint of any number of ranks.

        Raises:
            RunError: the directory holds no state, or not the parameters of this method.
        """
        with shares.Shares(directory / shares.STATE) as stored:
            self._partitions.read(stored, stored.record["adam_steps"])
            self._set_schedule(stored.record["schedule_steps"])
        return dict(stored.record["client"])

    def _set_schedule(self, steps: int) -> None:
        rates = [group["initial_lr"] * lr_factor(self.train, steps) for group in self._adam.param_groups]
        self._schedule.load_state_dict(self._schedule.state_dict() | {"last_epoch": steps, "_last_lr": rates})
        for group, lr in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = lr


def _without_gradients(adam: Any, *_: object) -> None:
    """Adam leaves alone what has no gradient; DeepSpeed's wrappers do not even ask it, where the gradient overflows."""
    if getattr(adam, "overflow", False):
        adam.zero_grad(set_to_none=True)


def _not_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient has infinite values or none; the device is read once."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return bool(gradients) and not bool(nn.utils.get_total_norm(gradients, math.inf).isfinite())


def allow_tf32() -> None:
    """Let float32 matrix products and convolutions of this process run on tensor cores (10 bits of mantissa)."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def import_deepspeed(accelerator: str) -> Any:
    """DeepSpeed, quietly, for ``cpu`` or ``cuda``: the first call in a process decides."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    if "deepspeed" not in sys.modules:
        # DeepSpeed's autotuner imports mlflow where it finds it: 80% of its import time, for something unused here.
        absent = {name: sys.modules.get(name) for name in ("mlflow",) if name not in sys.modules}
        sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
        try:
            import deepspeed
        finally:
            for name in absent:
                del sys.modules[name]
    import deepspeed
    import deepspeed.ops

    # Left alone, the first look at this table runs a compiler for every optional kernel, then builds one of them.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
