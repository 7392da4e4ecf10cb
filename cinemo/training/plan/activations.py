"""Bytes of activations and operations of a training step, counted without computing: tensors are shapes only."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from cinemo.config import Checkpointing, Recipe
from cinemo.methods import build_method, mark_trainable
from cinemo.networks.attention import _kept_positions
from cinemo.training.run.batch import blank_condition, blank_example, latent_shape
from cinemo.types import LatentBatch

_ACCELERATOR_THREADS = 128  # as many would give a CPU's pieces (`networks.memory.residual`) the size of a GPU's


_aten = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop(q, k, v))


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop(gradient, q, k, v))


_FLOPS: dict[Any, Callable[..., Any]] = flop_registry | {  # what it lacks are a CPU's kernels
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Counted:
    """Of forward and backward of one micro batch: ``activations``, the most bytes held at one time beside weights and
    whole gradients; ``flops``, executed in all.
    """

    activations: int
    flops: int


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made while it is active held at one time (``peak``), and their FLOPs (``flops``).

    `FlopCounterMode` would not do: its hooks keep tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = self.flops = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        if count := _FLOPS.get(function._overloadpacket):
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self._seen:
                    self._seen.add(storage)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, size: int) -> None:
        self._now -= size


def precision(recipe: Recipe) -> torch.dtype:
    """What the network computes in."""
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def shapes(recipe: Recipe, device: str) -> nn.Module:
    """The method of a recipe as it is trained, its weights in the recipe's precision: nothing is initialised on meta.

    What learns is what requires gradients.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(precision(recipe))
    try:
        with torch.device(device):
            method = build_method(recipe)
            mark_trainable(method, recipe.train)
            return method
    finally:
        torch.set_default_dtype(default)


def counted(recipe: Recipe, checkpointing: Checkpointing, micro_batch: int) -> Counted:
    """What forward and backward of one micro batch take.

    The order of operations is that of a CPU, also for an accelerator (whose attention kernels keep the same tensors);
    workspaces of convolution libraries do not count. Seconds for the full-size network.
    """
    train, dtype = recipe.train, precision(recipe)
    frames, channels, rows, columns = latent_shape(recipe)
    example, threads = blank_example(recipe), torch.get_num_threads()
    on_accelerator = train.gpus_per_worker > 0
    # A cached table of shapes must not get among those of a real network, nor the other way round.
    _kept_positions.cache_clear()
    torch.set_num_threads(_ACCELERATOR_THREADS if on_accelerator else max(1, int(train.cpus_per_worker)))
    try:
        with FakeTensorMode():
            method: Any = shapes(recipe, "cpu")
            method.checkpoint_activations(checkpointing)
            for parameter in method.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            video_BCFHW = torch.empty(micro_batch, channels, frames, rows, columns)
            shape = method.target_shape((channels, frames, rows, columns))
            steps_B = torch.zeros(micro_batch, dtype=torch.long)
            batch = LatentBatch(video_BCFHW, blank_condition(recipe, example, video_BCFHW, dtype))
            memory = PeakMemory()
            with memory:
                method(batch, steps_B, torch.empty(micro_batch, *shape), reduction="none").mean().backward()
    finally:
        torch.set_num_threads(threads)
        _kept_positions.cache_clear()
    return Counted(memory.peak, memory.flops)
