"""LoRA adapters beside a network's weights, a row of the batch with one, another, or none.

`cinemo.networks.lora.merge_lora` makes W + B A of one adapter; here W x is computed for all rows together, and B A x is
added to those that ask for it, so that requests with different adapters share a call of the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cinemo.networks.lora import DIFFUSERS_FILE, PEFT_FILE
from cinemo.networks.memory import slices_of
from cinemo.types import InputError

MOST_SCALE = 4.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIXES = {PEFT_FILE: "base_model.model.", DIFFUSERS_FILE: "unet."}


@dataclass(frozen=True, eq=False)
class Adapter:
    """``layers``: (A (r, in), B (out, r)) by the layer's name, alpha/r in B. ``sha256``: of its file."""

    name: str
    layers: Mapping[str, tuple[Tensor, Tensor]]
    sha256: str


Choice = tuple[Adapter, float]
"""An adapter and how much of it: 1 as it was trained."""


class Adapters:
    """Those that a bundle's networks can be asked with, by name, and which rows of the next calls ask for which."""

    def __init__(self, found: Mapping[str, Adapter] | None = None) -> None:
        self.found = dict(found or {})
        self.rows: Sequence[Choice | None] = ()

    def choose(self, asked: str) -> Choice:
        """Of ``NAME`` or ``NAME:SCALE``. Raises `InputError`: no such adapter, or no such scale."""
        name, scale = parse_choice(asked)
        if name not in self.found:
            raise unknown(name, self.found)
        return self.found[name], scale

    @contextmanager
    def using(self, rows: Sequence[Choice | None]) -> Iterator[None]:
        """In calls within, the first dimension of what a layer sees is equal parts, one for each of ``rows``."""
        before, self.rows = self.rows, rows if any(rows) else ()
        try:
            yield
        finally:
            self.rows = before

    def attach(self, networks: Mapping[str, nn.Module]) -> None:
        """Let every layer that an adapter has read `rows`.

        Raises:
            InputError: an adapter is of another network.
        """
        for adapter in self.found.values():
            for layer, (a, b) in adapter.layers.items():
                part, _, inside = ("", "", layer) if len(networks) == 1 else layer.partition(".")
                network = networks.get(part) if part else next(iter(networks.values()))
                try:
                    module = None if network is None else network.get_submodule(inside)
                except AttributeError:
                    module = None
                if network is None or not isinstance(module, nn.Linear):
                    raise InputError(f"adapter {adapter.name}: the bundle has no linear layer {layer!r}")
                if (a.shape[1], b.shape[0], a.shape[0]) != (module.in_features, module.out_features, b.shape[1]):
                    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                    raise InputError(
                        f"adapter {adapter.name}: {layer} has {shapes}, expected (r, {module.in_features}) and "
                        f"({module.out_features}, r)"
                    )
                if not isinstance(module, _Adapted):
                    parent, _, leaf = inside.rpartition(".")
                    module = _Adapted(module, self)
                    setattr(network.get_submodule(parent), leaf, module)
                module.pairs[adapter.name] = a.to(module.weight), b.to(module.weight)


class _Adapted(nn.Linear):
    """A linear layer around the tensors of ``base``."""

    def __init__(self, base: nn.Linear, adapters: Adapters) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._adapters = [adapters]  # in a list: it is no part of the layer

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        rows = self._adapters[0].rows
        begin, end, whole = slices_of(len(x))
        place = 0
        while place < len(rows):  # neighbours with the same choice at once
            stop = place + 1
            while stop < len(rows) and rows[stop] == rows[place]:
                stop += 1
            choice = rows[place]
            first = max(place * whole // len(rows), begin) - begin
            last = min(stop * whole // len(rows), end) - begin
            if choice is not None and choice[0].name in self.pairs and first < last:
                a, b = self.pairs[choice[0].name]
                out[first:last] += (choice[1] * (x[first:last] @ a.T)) @ b.T
            place = stop
        return out


def parse_choice(asked: str) -> tuple[str, float]:
    """(name, scale) of ``NAME`` or ``NAME:SCALE``. Raises `InputError`."""
    name, colon, text = asked.partition(":")
    try:
        scale = float(text) if colon else 1.0
    except ValueError:
        scale = float("nan")
    if not _NAME.fullmatch(name) or not -MOST_SCALE <= scale <= MOST_SCALE:
        raise InputError(
            f"lora is {asked[:80]!r}, expected NAME or NAME:SCALE with a scale of -{MOST_SCALE:g}..{MOST_SCALE:g}"
        )
    return name, scale


def unknown(name: str, known: Mapping[str, object]) -> InputError:
    there = f"there is {', '.join(sorted(known))}" if known else "there is none at all"
    return InputError(f"lora: there is no adapter {name!r}; {there}")


def places(directory: Path) -> dict[str, Path]:
    """The adapters of a directory by name: folders that ``export.py --adapter`` wrote, and files of diffusers' format;
    or the directory is one such folder.

    Raises:
        InputError: there is no such directory.
    """
    if not directory.is_dir():
        raise InputError(f"--lora {directory}: no such directory; expected one with adapters from export.py --adapter")
    own = next((directory / name for name in _PREFIXES if (directory / name).is_file()), None)
    if own is not None:
        return {directory.name: own}
    found = {}
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            file = next((entry / name for name in _PREFIXES if (entry / name).is_file()), None)
        else:
            file = entry if entry.suffix == ".safetensors" else None
        name = entry.name if entry.is_dir() else entry.stem
        if file is not None and _NAME.fullmatch(name):
            found[name] = file
    return found


def adapter_name(directory: Path) -> str:
    """Of a directory that holds one adapter. Raises `InputError`: it holds none, or several."""
    names = list(places(directory))
    if len(names) != 1:
        raise InputError(f"--lora {directory}: holds {', '.join(names) or 'no adapter'}, expected one adapter")
    return names[0]


def load(directory: Path) -> Adapters:
    """The adapters of a directory. Raises `InputError`: no such directory, or a file is damaged."""
    return Adapters({name: _read(name, path) for name, path in places(directory).items()})


def digest(path: Path) -> str:
    """sha256 of an adapter's file. Raises `InputError`: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"adapter {path}: cannot be read ({error.strerror})") from None


def _read(name: str, path: Path) -> Adapter:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors, scale = load_file(path), 1.0
        if path.name == PEFT_FILE:
            config = json.loads((path.parent / "adapter_config.json").read_bytes())
            scale = config["lora_alpha"] / config["r"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"adapter {name}: {path} cannot be read ({error})") from None
    prefix = _PREFIXES.get(path.name, _PREFIXES[DIFFUSERS_FILE])
    plain = {key.removeprefix(prefix): value for key, value in tensors.items()}
    layers = {}
    for key, a in plain.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            b = plain.get(f"{layer}.lora_B.weight")
            if b is None or a.ndim != 2 or b.ndim != 2:
                raise InputError(f"adapter {name}: {path}: {layer} has no pair of matrices lora_A and lora_B")
            layers[layer] = a, torch.as_tensor(scale) * b
    if not layers:
        raise InputError(f"adapter {name}: {path} holds no lora_A and lora_B; expected what export.py --adapter writes")
    return Adapter(name, layers, digest(path))
