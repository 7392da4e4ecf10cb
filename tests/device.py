"""A device that can be given work and never read: PyTorch's ``meta`` device in the place of an accelerator.

Tensors there have shapes only, and reading a value raises. `Waits` notes what would make the host wait for an
accelerator beside that: copies between the two that are not asynchronous.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.is_nonzero.default}


class Waits(TorchDispatchMode):
    """While active, notes in ``found`` what waits for `DEVICE`, by operation and line; and in ``uploaded`` the host's
    tensors that were copied there without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.uploaded: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _READS and any(leaf.device == DEVICE for leaf in tree_leaves(args) if torch.is_tensor(leaf)):
            self._note(function)
        if function is _aten.copy_.default:
            self._copied(function, args[1], args[0].device, len(args) > 2 and args[2])
        elif function is _aten._to_copy.default:
            self._copied(function, args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False))
        return function(*args, **kwargs)

    def _copied(self, function: Any, source: torch.Tensor, device: Any, non_blocking: bool) -> None:
        if source.device == torch.device(device):
            return
        if non_blocking and source.device.type == "cpu":
            self.uploaded.append(source)
        else:
            self._note(function)

    def _note(self, function: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/cinemo/" in frame.filename]
        self.found.append(f"{function} in {frames[-1].filename}:{frames[-1].lineno}" if frames else str(function))
