"""Golden files: where they lie, how their weights are drawn, and how a family of them is run case by case.

They lie in ``$CINEMO_GOLDENS``, or in ``../shared/goldens`` beside the checkout; without them golden tests skip.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cinemo.networks.attention import rotary_frequencies

ROOT = Path(__file__).resolve().parent.parent
FLOAT64, FLOAT32 = 1e-9, 2e-5


def golden_files(pattern: str) -> list[Path]:
    """All files of a family, for example ``cinemo/ddim*.npz``; skips the test where there are none."""
    directory = Path(os.environ.get("CINEMO_GOLDENS") or ROOT.parent / "shared" / "goldens")
    files = sorted(directory.glob(pattern))
    if not files:
        pytest.skip(f"no golden files {pattern} in {directory} (set CINEMO_GOLDENS)")
    return files


class Golden:
    """One npz file: arrays named ``case.array`` and a description."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta_json", "{}")))

    def has(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = torch.tensor(self.arrays[name])
        return value.to(dtype) if value.is_floating_point() else value


class Tally:
    """Compares arrays, remembers the worst error of a family, and says how many cases ran."""

    def __init__(self, family: str) -> None:
        self.family, self.cases, self.worst = family, set[tuple[str, str]](), dict[str, float]()

    def check(self, golden: Golden, case: str, kind: str, got: Tensor, name: str, tolerance: float) -> None:
        """``got`` equals the array ``case.name`` within ``tolerance`` times its largest magnitude (at least 1)."""
        expected = golden.arrays[f"{case}.{name}"]
        assert tuple(got.shape) == expected.shape, f"{golden.path.name} {case}.{name}"
        error = float(np.abs(got.detach().numpy().astype(np.float64) - expected).max())
        limit = tolerance * max(1.0, float(np.abs(expected).max()))
        assert error <= limit, f"{golden.path.name} {case}.{name} ({kind}): error {error:.2e} > {limit:.2e}"
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        self.cases.add((golden.path.name, case))

    def finish(self, say: Callable[[str], None]) -> None:
        assert self.cases, f"{self.family}: no case ran"
        files = len({file for file, _ in self.cases})
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in sorted(self.worst.items()))
        say(f"golden {self.family}: {len(self.cases)} cases in {files} file(s); worst {errors}")


class Family:
    """The files of one family of `sisters/`: every one is compared, and the worst error of each kind printed."""

    def __init__(self, name: str) -> None:
        self.name, self.worst = name, dict[str, float]()
        self.files = golden_files(f"sisters/{name}*.npz")

    def __iter__(self) -> Any:
        for path in self.files:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            yield path.name, json.loads(str(arrays.pop("meta"))), arrays

    def check(self, where: str, kind: str, got: Any, expected: np.ndarray, tolerance: float) -> None:
        got = np.asarray(got, np.float64)
        assert got.shape == expected.shape, f"{where} {kind}: {got.shape}, expected {expected.shape}"
        error = float(np.abs(got - expected).max())
        assert error <= tolerance, f"{where} {kind}: error {error:.2e} > {tolerance:.0e}"
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)

    def finish(self, say: Callable[[str], None]) -> None:
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in sorted(self.worst.items()))
        say(f"golden {self.name}: {len(self.files)} file(s); worst {errors}")


def golden_tensor(name: str, shape: torch.Size) -> Tensor:
    """A weight drawn from its name, by the rule in the goldens' description."""
    if name.endswith("rotary_emb.freqs"):
        return rotary_frequencies()
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("relative_attention_bias.weight"):
        return 0.5 * drawn
    if drawn.dim() == 1:
        return 1 + 0.1 * drawn if name.endswith(".weight") else 0.1 * drawn
    return drawn * (drawn.numel() / drawn.shape[0]) ** -0.5


def fill_golden(module: torch.nn.Module, checks: Mapping[str, Any] | None = None) -> None:
    """Give a module (built on the meta device) golden weights; ``checks`` are checksums of some of them."""
    state = {name: golden_tensor(name, value.shape) for name, value in sorted(module.state_dict().items())}
    for name, check in (checks or {}).items():
        assert state[name].double().sum().item() == pytest.approx(check["sum"], abs=1e-3), f"{name} drawn differently"
    module.load_state_dict(state, assign=True)
