"""Where DeepSpeed keeps this rank's master weights and optimiser state, for each ZeRO stage.

`Fragment`s are views: a checkpoint is written from them and read into them (`cinemo.training.checkpoint.shares`).
Moments of 8 bits are in it as the float32 values that they stand for, so that any optimiser and any partition can go
on with them; where blocks are cut in the same places, the same codes come back (`cinemo.training.run.adam8bit`).
DeepSpeed's own files can be taken up by the same number of ranks only, its converter to universal ones does not know
stage 0, a state beside Adam's two moments, or a way from stage 2 to 3; and both are pickles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cinemo.training.checkpoint.shares import WEIGHT, Fragment, Shares
from cinemo.training.run.averaging import AveragingAdam

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Place(NamedTuple):
    """Values ``start``, ... of a flattened parameter: ``length`` from ``offset`` on of what the optimiser works on."""

    parameter: nn.Parameter
    shape: torch.Size
    start: int
    master: Tensor
    offset: int
    length: int


class Partitions:
    """Views of one rank's share of a DeepSpeed engine's state.

    Args:
        engine: as ``deepspeed.initialize`` returned it, around Adam.
        adam: the optimiser that was handed in.
    """

    def __init__(self, engine: Any, adam: torch.optim.Optimizer, stage: int, rank: int, world: int) -> None:
        self._engine, self._adam, self._stage, self._rank, self._world = engine, adam, stage, rank, world
        self._adam8bit: Any = adam if hasattr(adam, "unpacked") else None
        self._unpacked: dict[Tensor, dict[str, Tensor]] = {}  # moments that were 8-bit, while they are read or written
        self.averages = adam.averages if isinstance(adam, AveragingAdam) else ()
        self._keys = (*_MOMENTS, *self.averages)
        self._names: dict[nn.Parameter, str] = {value: name for name, value in engine.module.named_parameters()}

    def written(self, keys: Sequence[str] = ()) -> Iterator[Fragment]:
        """What this rank writes: all ranks together each value once.

        ``keys``: only these of what is trained; none: everything, frozen parameters too.
        """
        replicated = self._stage == 0
        for fragment in self._trained():
            if keys:
                fragment = replace(fragment, values={key: fragment.values[key] for key in keys})
            yield fragment.part(self._rank, self._world) if replicated else fragment
        self._unpacked = {}
        if keys:
            return
        for fragment in self._frozen():
            yield fragment if self._stage == 3 else fragment.part(self._rank, self._world)

    @property
    def written_bytes(self) -> int:
        """The size of what `written` yields; about, where a rank's part of it is rounded."""
        trained = 4 * (1 + len(self._keys)) * sum(place.length for place in self._places())
        frozen = sum(fragment.values[WEIGHT].nbytes for fragment in self._frozen())
        return trained // (1 if self._stage else self._world) + frozen // (1 if self._stage == 3 else self._world)

    @property
    def steps(self) -> int:
        """Steps that Adam has done."""
        return max((int(state["step"]) for state in self._adam.state.values() if state), default=0)

    @torch.no_grad()
    def read(self, shares: Shares, steps: int) -> None:
        """Fill this rank's share, then the weights that the network computes with. Every rank must call."""
        with self._changing_masters():
            for fragment in (*self._trained(), *self._frozen()):
                for key, values in fragment.values.items():
                    # Averages that were switched on after this checkpoint begin at its weights.
                    stored = WEIGHT if key in self.averages and not shares.has(key, fragment.name) else key
                    shares.read(stored, fragment.name, fragment.shape, values, fragment.start)
            if self._adam8bit is not None:
                for master, moments in self._unpacked.items():
                    self._adam8bit.pack(master, moments, steps)
                self._unpacked = {}
            else:
                for state in self._adam.state.values():
                    state["step"].fill_(steps)
        if isinstance(self._adam, AveragingAdam):
            self._adam.recount()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The first of the averages in the place of the weights, where there is one. Every rank must call."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if not self.averages:
            return
        with self._changing_masters():
            for fragment in self._trained():
                weights, averages = (fragment.values[key] for key in (WEIGHT, self.averages[0]))
                kept = weights.clone()
                weights.copy_(averages)
                averages.copy_(kept)

    @contextmanager
    def _changing_masters(self) -> Iterator[None]:
        """Around what changes master weights: then the network computes with them."""
        wrapper = self._engine.optimizer
        if self._stage == 3:
            wrapper.checkpoint_event_prologue()  # small weights that stay whole give way to their shares
        yield
        if self._stage == 0 and self._mixed:
            for lower, master in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for parameter, whole in zip(lower, master, strict=True):
                    parameter.copy_(whole)
        elif self._stage in (1, 2):
            wrapper.update_lp_params()
        elif self._stage == 3:
            for flat, master in zip(
                wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True
            ):
                flat.copy_(master)
            wrapper.checkpoint_event_epilogue()

    @property
    def _mixed(self) -> bool:
        return self._engine.optimizer is not self._adam

    def _places(self) -> Iterator[_Place]:
        """Of what learns."""
        wrapper = self._engine.optimizer
        if self._stage == 0 and not self._mixed:
            for parameter in self._names:
                if parameter.requires_grad:
                    yield _Place(parameter, parameter.shape, 0, parameter, 0, parameter.numel())
        elif self._stage == 0:
            for lower, master in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for parameter, whole in zip(lower, master, strict=True):
                    yield _Place(parameter, parameter.shape, 0, whole, 0, whole.numel())
        elif self._stage in (1, 2):
            for group, flat in zip(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True):
                for parameter in group:
                    if parameter._hp_mapping is not None:  # else it lies wholly on other ranks
                        inside = parameter._hp_mapping.lp_fragment_address
                        held = parameter._hp_mapping.hp_fragment_address
                        yield _Place(parameter, parameter.shape, inside.start, flat, held.start, held.numel)
        else:
            for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for parameter in group:
                    start, count = self._share(parameter)
                    yield _Place(parameter, parameter.ds_shape, start, flat, offset, count)
                    offset += parameter.partition_numel()

    def _trained(self) -> Iterator[Fragment]:
        return map(self._fragment, self._places())

    def _frozen(self) -> Iterator[Fragment]:
        for parameter, name in self._names.items():
            if parameter.requires_grad:
                continue
            if self._stage == 3:
                start, count = self._share(parameter)
                values = parameter.ds_tensor.detach()[:count]  # type: ignore[attr-defined]
                yield Fragment(name, tuple(parameter.ds_shape), start, {WEIGHT: values})  # type: ignore[attr-defined]
            else:
                yield Fragment(name, tuple(parameter.shape), 0, {WEIGHT: parameter.detach().view(-1)})

    def _share(self, parameter: Any) -> tuple[int, int]:
        """First value and number of values of a ZeRO-3 parameter on this rank; shares are equal, the last padded."""
        start = min(self._rank * parameter.partition_numel(), parameter.ds_numel)
        return start, min(parameter.partition_numel(), parameter.ds_numel - start)

    def _fragment(self, place: _Place) -> Fragment:
        tensors = {WEIGHT: place.master, **self._state(place.master)}
        run = slice(place.offset, place.offset + place.length)
        values = {key: value.detach().view(-1)[run] for key, value in tensors.items()}
        return Fragment(self._names[place.parameter], tuple(place.shape), place.start, values)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        if self._adam8bit is not None:
            if master not in self._unpacked:
                self._unpacked[master] = self._adam8bit.unpacked(master)
            return self._unpacked[master]
        state = self._adam.state[master]
        if "step" not in state:  # as fused Adam would at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for key in self._keys:
            if key not in state:
                state[key] = master.detach().clone() if key in self.averages else torch.zeros_like(master.detach())
        return {key: state[key] for key in self._keys}
