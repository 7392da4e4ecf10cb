"""UNet weights: reading published and own files with every key accounted for, and writing own ones.

A weights location is a file, a directory in diffusers layout (of a UNet, or of a pipeline that has one in ``unet/``),
``package:NAME`` or ``s3://``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cinemo import cache, storage
from cinemo.networks.attention import rotary_frequencies
from cinemo.networks.blocks import Embedding
from cinemo.networks.lavie_unet import ONLY, LavieUNet, UNetConfig
from cinemo.networks.weight_files import DIFFUSERS, TRANSFORMERS, WeightFiles
from cinemo.types import InputError

WEIGHTS_NAME = DIFFUSERS[0]
_NAMES = (*DIFFUSERS, *TRANSFORMERS)

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def resolve(location: str) -> Path:
    """The local path of a weights location; s3:// is fetched to the local cache.

    Raises:
        InputError: nothing is there.
    """
    if not location.startswith("package:"):
        return cache.localize(location)
    path = Path(str(resources.files("cinemo"))) / "assets" / location.removeprefix("package:")
    if not path.exists():
        raise InputError(f"{location}: not shipped with this installation ({path} does not exist)")
    return path


def weights_digest(location: str) -> str:
    """sha256 (hex) over names and contents of all files at a location; where it lies does not matter."""
    path = resolve(location)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        with file.open("rb") as stream:
            digest.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_config(directory: Path, location: str, name: str = "config.json") -> dict[str, Any]:
    """The ``config.json`` of a network's directory."""
    path = directory / name
    if not path.is_file():
        raise InputError(f"{location}: {name} is missing there; expected a network's directory in diffusers layout")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{location}: {name} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{location}: {name} holds a {type(values).__name__}, expected an object")
    return values


def published_config(values: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The entries of a published UNet's ``config.json`` that `UNetConfig` has.

    Others are names of classes, or settings that change no result where the weights fit.

    Raises:
        InputError: an entry asks for what this network cannot do.
    """
    for key, only in ONLY.items():
        if values.get(key) not in (None, only):
            raise InputError(
                f"{location}: config.json has {key} = {values[key]!r}, this network supports only {only!r}"
            )
    return {name: values[name] for name in UNetConfig.model_fields if values.get(name) is not None}


def load_unet(
    config: UNetConfig,
    location: str,
    dtype: torch.dtype | None = None,
    motion_optional: bool = False,
    grow_input: bool = False,
) -> LavieUNet:
    """A UNet with the weights at ``location`` (.safetensors, or .bin/.pt read without running code), on the CPU.

    Args:
        dtype: cast to it; None keeps the file's.
        motion_optional: the motion-id network may be absent, as in LaVie's base weights; it is then initialised
            (global torch RNG) with a last weight of zero.
        grow_input: the file's network may take fewer channels; the weights of the further ones are zero.

    Raises:
        InputError: the file has missing, extra or misshapen entries, or cannot be read.
    """
    state = read_tensors(weight_files(location), location, dtype)
    with torch.device("meta"):
        unet = LavieUNet(**config.model_dump())
    expected = unet.state_dict()
    # Files may lack the rotary tables: all are the same formula, and savers drop tensors that share memory.
    state |= {name: rotary_frequencies() for name in expected if name.endswith("rotary_emb.freqs")}
    if motion_optional and not any(name.startswith("add_embedding.") for name in state):
        state |= fresh_motion(config)
    if grow_input and "conv_in.weight" in state:
        state["conv_in.weight"] = _grown(state["conv_in.weight"], config.in_channels)
    compare(state, expected, location)
    if dtype is not None:
        for name in state:
            state[name] = state[name].to(dtype)
    unet.load_state_dict(state, assign=True)
    return unet


def load_network(network: nn.Module, location: str, folder: str, dtype: torch.dtype | None = None) -> None:
    """Give ``network``, made on the meta device, the weights at a location, on the CPU.

    Args:
        folder: the network's own in a pipeline's directory.
        dtype: as `load_unet` has it.

    Raises:
        InputError: there are none, or they have missing, extra or misshapen entries.
    """
    state = read_tensors(weight_files(location, folder), location, dtype)
    compare(state, network.state_dict(), location)
    network.load_state_dict(state if dtype is None else {n: x.to(dtype) for n, x in state.items()}, assign=True)


def save_network(network: nn.Module, directory: Path) -> None:
    """Write ``config.json`` (its ``config``) and the weights in diffusers layout; equal weights give equal bytes."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    # Straight from the tensors' memory to the disk: the weights are never there twice.
    partial = directory / f".{WEIGHTS_NAME}.partial"
    save_file(state, partial, {"format": "pt"})
    os.chmod(partial, 0o644)  # safetensors keeps its files to their owner; a bundle is for others
    os.replace(partial, directory / WEIGHTS_NAME)
    storage.write_json(str(directory / "config.json"), network.config)


def gather(files: WeightFiles, target: Path, location: str) -> None:
    """Write the tensors of a ``.bin`` (read without running code), of shards or of a variant as one safetensors file.

    Raises:
        InputError: a file cannot be read so, or holds something else than tensors.
    """
    from safetensors.torch import save_file

    state = read_tensors(files, location)
    if any(path.suffix != ".safetensors" for path in files.paths):
        # A safetensors file holds no shared memory, and no tensor with gaps.
        state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    save_file(state, target, {"format": "pt"})
    os.chmod(target, 0o644)


def weight_files(location: str, network: str = "unet") -> WeightFiles:
    """The files of a network's weights at a location: itself, or in diffusers layout.

    Args:
        network: the folder of the network in a pipeline's directory.

    Raises:
        InputError: there are none.
    """
    if files := find_weights(location, network):
        return files
    called = "UNet" if network == "unet" else network
    raise InputError(
        f"{location}: no {called} weights there, expected one of {', '.join(_NAMES)}, shards with an index, "
        f"or a folder with {network}/"
    )


def find_weights(location: str, network: str) -> WeightFiles | None:
    """As `weight_files`; None where there are none."""
    path = resolve(location)
    if path.is_file():
        return WeightFiles((path,))
    return WeightFiles.find(path, location, *_NAMES) or WeightFiles.find(path / network, location, *_NAMES)


def read_tensors(
    files: WeightFiles, location: str, dtype: torch.dtype | None = None, tables: Sequence[str] = ("ema",)
) -> dict[str, Tensor]:
    """The tensors of a network by name, as views of its files where they need not be cast; no code is run.

    Args:
        dtype: cast those of a safetensors file to it.
        tables: where the tensors may be, other than at a file's top level; the first one that is there counts.

    Raises:
        InputError: a file cannot be read so, or holds something else.
    """
    files.check(location)
    tensors: dict[str, Tensor] = {}
    for path in files.paths:
        try:
            if path.suffix == ".safetensors":
                state: Any = _read_safetensors(path, dtype)
            else:
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{location}: not a readable weights file ({reason})") from error
        if isinstance(state, Mapping):
            state = next((state[name] for name in tables if isinstance(state.get(name), Mapping)), state)
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            places = " or ".join(map(repr, tables))
            raise InputError(f"{location}: expected a table of tensors by name, at its top level or under {places}")
        tensors |= state
    return tensors


def _read_safetensors(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors as the file's own pages; where they must be cast, each from a mapping that is closed again, or the
    file's pages would stay in memory beside the cast ones."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    state = {}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        stored = {file.get_slice(name).get_dtype() for name in names}
    if dtype is None or stored == {_SAFETENSORS_NAMES.get(dtype)}:
        return dict(load_file(path))
    for name in names:
        with safe_open(path, "pt") as file:
            state[name] = file.get_tensor(name).to(dtype, copy=True)
    return state


def _grown(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight for more input channels, which add nothing."""
    more = channels - weight.shape[1]
    return weight if more <= 0 else torch.cat([weight, weight.new_zeros(len(weight), more, *weight.shape[2:])], dim=1)


def fresh_motion(config: UNetConfig) -> dict[str, Tensor]:
    """Cinemo's motion-id network as a base without one gets it."""
    fresh = Embedding(config.addition_time_embed_dim, 4 * config.block_out_channels[0])
    torch.nn.init.zeros_(fresh.linear_2.weight)
    return {f"add_embedding.{name}": value for name, value in fresh.state_dict().items()}


def compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], location: str) -> None:
    """
    Raises:
        InputError: entries of ``expected`` are missing, strangers are there, or shapes differ; it lists them.
    """
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"extra {name}" for name in state if name not in expected]
    faults += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise InputError(f"{location}: weights do not fit the recipe's model ({len(faults)} entries): {shown}")
