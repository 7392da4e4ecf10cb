"""LoRA (arXiv 2106.09685): a linear layer W keeps its weights and learns two narrow matrices, W + alpha/r B A.

In a state dict it keeps its names (``to_q.weight``) and has two more, which are peft's: ``to_q.lora_A.weight`` (r, in)
and ``to_q.lora_B.weight`` (out, r). What was trained is exported merged (`merge_lora`), or alone (`save_adapter`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cinemo import storage
from cinemo.config import TrainConfig
from cinemo.networks.memory import add
from cinemo.types import InputError

_A, _B = ".lora_A.weight", ".lora_B.weight"
PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"


class LoraLinear(nn.Linear):
    """A linear layer W x + b + scale B A x, around the tensors of ``base``.

    B is zero at first, so that nothing changes; A is drawn as torch draws any linear layer (the paper's code and peft
    do the same; its text says Gaussian), from the global RNG.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        device, dtype = base.weight.device, base.weight.dtype
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        # The wide product comes last: `cinemo.networks.memory.recomputed` then does not repeat it.
        update = self.lora_B(self.scale * self.lora_A(x))
        return add(update, super().forward(x))


def lora_scale(train: TrainConfig) -> float:
    """alpha / r; without an alpha the update is not scaled."""
    return 1.0 if train.lora_alpha is None else train.lora_alpha / train.lora_rank


def add_lora(network: nn.Module, train: TrainConfig) -> list[str]:
    """Put a `LoraLinear` in the place of every linear layer that ``train.lora_layers`` names; returns their names.

    A layer is meant by its name or any end of it that begins after a dot: ``to_q``, ``attn_temp.to_q``. A network
    without linear layers stays as it is.

    Raises:
        InputError: an entry names no linear layer.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for layer in train.lora_layers if linear else ():
        if not _named(linear, [layer]):
            raise InputError(f"train.lora_layers: no linear layer's name ends with {layer!r}; {_near(layer, linear)}")
    found = _named(linear, train.lora_layers)
    for name in found:
        parent, _, leaf = name.rpartition(".")
        holder, base = network.get_submodule(parent), network.get_submodule(name)
        assert isinstance(base, nn.Linear)
        setattr(holder, leaf, LoraLinear(base, train.lora_rank, lora_scale(train)))
    return found


def merge_lora(state: Mapping[str, Tensor], train: TrainConfig) -> dict[str, Tensor]:
    """The state dict of the network without LoRA that does the same: W + alpha/r B A. Without LoRA in it, itself.

    The sum is taken in float64 and rounded once, to the wider dtype of W and the matrices: what trained in bfloat16 has
    W in that and the matrices in float32.
    """
    merged = {name: value for name, value in state.items() if not name.endswith((_A, _B))}
    for name in _adapted(state):
        weight, a, b = merged[f"{name}.weight"], state[name + _A], state[name + _B]
        update = lora_scale(train) * (b.double() @ a.double())
        merged[f"{name}.weight"] = (weight.double() + update).to(torch.promote_types(weight.dtype, b.dtype))
    return merged


def save_adapter(state: Mapping[str, Tensor], train: TrainConfig, directory: Path) -> list[str]:
    """Write what LoRA has learnt, in float32, for peft and for diffusers; returns the names of the adapted layers.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are peft's (``PeftModel.from_pretrained``).
    ``pytorch_lora_weights.safetensors`` is what diffusers loads (``load_lora_weights``, ``load_lora_adapter`` with the
    prefix ``unet``): a format without alpha, so B holds alpha/r there.

    Args:
        state: of the UNet.
        directory: made where it is missing.

    Raises:
        InputError: nothing of LoRA in ``state``.
    """
    from safetensors.torch import save_file

    names = _adapted(state)
    if not names:
        raise InputError(
            f"no adapter in this checkpoint: train.trainable is {train.trainable}, expected lora; "
            "export a bundle instead"
        )
    directory.mkdir(parents=True, exist_ok=True)
    peft: dict[str, Tensor] = {}
    diffusers: dict[str, Tensor] = {}
    for name in names:
        a, b = (state[name + part].float().contiguous() for part in (_A, _B))
        peft |= {f"base_model.model.{name}{_A}": a, f"base_model.model.{name}{_B}": b}
        diffusers |= {f"unet.{name}{_A}": a, f"unet.{name}{_B}": lora_scale(train) * b}
    save_file(peft, directory / PEFT_FILE, {"format": "pt"})
    save_file(diffusers, directory / DIFFUSERS_FILE, {"format": "pt"})
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        os.chmod(directory / name, 0o644)  # safetensors keeps its files to their owner
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": train.lora_rank,
        "lora_alpha": train.lora_alpha or train.lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(train.lora_layers),
    }
    storage.write_json(str(directory / "adapter_config.json"), config)
    return names


def _adapted(state: Iterable[str]) -> list[str]:
    return [name.removesuffix(_A) for name in state if name.endswith(_A)]


def _named(names: Iterable[str], layers: Sequence[str]) -> list[str]:
    """Those names that a layer of ``layers`` means: peft's rule for ``target_modules``."""
    return [name for name in names if any(f".{name}".endswith(f".{layer}") for layer in layers)]


def _near(layer: str, names: Iterable[str]) -> str:
    """What to write instead: ends of as many parts as ``layer`` has."""
    parts = layer.count(".") + 1
    ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
    close = difflib.get_close_matches(layer, ends, 3, 0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(ends[:12])}"
