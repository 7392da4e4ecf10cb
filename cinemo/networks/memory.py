"""Memory of activations: overwritten where nobody asks for gradients, and made again where somebody does."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cinemo.config import Checkpointing

# Values of the widest activation of a piece, see `residual`: per thread on a CPU (8 MB of float32), or on a GPU.
_CPU_PIECE, _GPU_PIECE = 2**21, 2**28
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def lean() -> bool:
    """Whether activations may be overwritten: nobody asks for gradients, and no compiler plans the memory instead."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def checkpoint_activations(network: nn.Module, what: Checkpointing) -> None:
    """How much a network, and each part of it that can, computes again in the backward pass instead of keeping it.

    ``none``: what norms and activation functions make, which costs next to nothing. ``selective``: also the branches of
    transformers that hold the most bytes for their operations, which are all but the attention inside a frame.
    ``whole``: every layer.
    """
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = what  # type: ignore[assignment]


def made_again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``; what it makes on its way is made again for the backward pass instead of kept.

    Args:
        function: draws no random numbers. Where it ends with a convolution or matrix product, that is not repeated.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


def plainly(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return function(*inputs)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`made_again`, for what costs next to nothing; in a compiled graph the compiler decides that."""
    return function(*inputs) if torch.compiler.is_compiling() else made_again(function, *inputs)


def add(own: Tensor, other: Tensor) -> Tensor:
    """Their sum, in the memory of ``own`` where that is allowed."""
    return own.add_(other) if lean() else own + other


def silu(own: Tensor) -> Tensor:
    return F.silu(own, inplace=lean())


def residual(y: Tensor, dim: int, branch: Callable[[Tensor], Tensor], widest: int) -> Tensor:
    """``y + branch(y)`` for a branch that treats the slices of ``y`` along ``dim`` independently.

    Some slices at a time, so that what the branch makes stays small; without gradients in place.

    Args:
        widest: the branch's activations at one time, as a multiple of its input.
    """
    if torch.compiler.is_compiling():
        return y + branch(y)
    pieces = y.split(_slices(y, dim, y.numel() * widest), dim)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        sums = [piece + branch(piece) for piece in pieces]
        return torch.cat(sums, dim) if len(sums) > 1 else sums[0]
    if dim:
        for piece in pieces:
            piece += branch(piece)
        return y
    begin = 0
    for piece in pieces:
        _piece.slices = (begin, begin + len(piece), len(y))
        try:
            piece += branch(piece)
        finally:
            _piece.slices = None
        begin += len(piece)
    return y


class _Piece(threading.local):
    """(begin, end, whole) of the first dimension, where `residual` goes through that in pieces."""

    slices: tuple[int, int, int] | None = None


_piece = _Piece()


def slices_of(length: int) -> tuple[int, int, int]:
    """(begin, end, whole): which slices of a whole a layer sees that is given ``length`` of them."""
    return _piece.slices or (0, length, length)


def in_pieces(function: Callable[..., Tensor], inputs: Sequence[Tensor], dim: int, widest: int) -> Tensor:
    """``function(*inputs)`` for one that treats the slices along ``dim`` independently, some slices at a time.

    Args:
        widest: how many values the function holds at one time, for all slices.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)
    slices = _slices(inputs[0], dim, widest)
    pieces = zip(*(x.split(slices, dim) for x in inputs), strict=True)  # type: ignore[no-untyped-call]
    out = [function(*piece) for piece in pieces]
    return torch.cat(out, dim) if len(out) > 1 else out[0]


def _slices(like: Tensor, dim: int, values: int) -> int:
    """How many slices along ``dim`` make a piece, where all together hold ``values``."""
    most = _CPU_PIECE * torch.get_num_threads() if like.device.type == "cpu" else _GPU_PIECE
    if torch.is_grad_enabled():
        most *= 4  # each piece adds to the weights' gradients
    return max(most * like.shape[dim] // values, 1)


def keep_freed_memory() -> None:
    """Let the C library keep up to 2 GB of freed memory for this process (Linux; elsewhere nothing happens).

    By default every activation above 32 MB goes back to the system, which hands it out again page by page, zeroed:
    on a CPU up to a fifth of the network's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
