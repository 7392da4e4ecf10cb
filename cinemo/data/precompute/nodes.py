"""The machines that a plan is made for: so many nodes of a kind, such as ``10x32+1xL40S-48GB``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cinemo.accelerators import Accelerator, accelerator
from cinemo.types import InputError

_PATTERN = re.compile(r"(\d{1,9})x(\d{1,9})(?:\+(\d{1,9})x([\w-]+))?", re.ASCII)


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes, each of ``cores`` cores and ``accelerators`` accelerators of one kind (None: it has none)."""

    count: int
    cores: int
    accelerators: int = 0
    kind: Accelerator | None = None

    def __str__(self) -> str:
        nodes = f"{self.count:,} node{'s' * (self.count != 1)} of {self.cores} cores"
        return f"{nodes} and {self.accelerators} {self.kind.name}" if self.kind else nodes


@dataclass(frozen=True)
class Machines:
    """All nodes of a cluster."""

    nodes: tuple[Nodes, ...]

    @property
    def cores(self) -> int:
        return sum(nodes.count * nodes.cores for nodes in self.nodes)

    @property
    def accelerators(self) -> int:
        return sum(nodes.count * nodes.accelerators for nodes in self.nodes)

    @property
    def kinds(self) -> tuple[Accelerator, ...]:
        return tuple(nodes.kind for nodes in self.nodes if nodes.kind)

    def __str__(self) -> str:
        return " and ".join(map(str, self.nodes))


def parse_machines(texts: Sequence[str]) -> Machines:
    """
    Args:
        texts: each ``NODESxCORES[+COUNTxACCELERATOR]``.

    Raises:
        InputError: one is written otherwise, is empty, or names an unknown accelerator.
    """
    return Machines(tuple(map(_parse, texts)))


def _parse(text: str) -> Nodes:
    match = _PATTERN.fullmatch(text)
    if not match:
        raise InputError(f"--on {text!r}: expected NODESxCORES[+COUNTxACCELERATOR], such as 10x32 or 10x32+1xL40S-48GB")
    count, cores, accelerators = (int(part or 0) for part in match.groups()[:3])
    if not count or not cores or (match[4] and not accelerators):
        raise InputError(f"--on {text!r}: expected at least one node, core and accelerator")
    return Nodes(count, cores, accelerators, accelerator(match[4]) if match[4] else None)
