"""What nodes of Amazon's instance types have for pods, from the published table of instance types that moto carries."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import moto

_SUFFIXES = {"m": Decimal("0.001"), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_MI = 2**20
# Of the memory that is sold, so much never reaches the operating system; Karpenter counts with the same share.
_HIDDEN = Decimal("0.075")


def Quantity(text: str) -> Decimal:
    """A Kubernetes quantity, such as 500m or 16Gi."""
    for suffix, factor in _SUFFIXES.items():
        if text.endswith(suffix):
            return Decimal(text.removesuffix(suffix)) * factor
    return Decimal(text)


@cache
def _table() -> dict[str, Any]:
    path = Path(moto.__file__).parent / "ec2/resources/instance_types.json.gz"
    table: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return table


def usage_classes(name: str) -> list[str]:
    """``on-demand``, ``spot``, ... : how an instance type is sold."""
    sold: list[str] = _table()[name]["SupportedUsageClasses"]
    return sold


def allocatable(name: str) -> dict[str, Decimal]:
    """CPUs, bytes of memory and accelerators for the pods of an EKS node.

    EKS keeps 6% of the first core, 1% of the second, 0.5% of the next two and 0.25% of the rest; 255 MiB and 11 MiB for
    each pod that the network interfaces have addresses for; and 100 MiB before it evicts.
    """
    about = _table()[name]
    cores = about["VCpuInfo"]["DefaultVCpus"]
    kept = Decimal("0.06") + Decimal("0.01") + 2 * Decimal("0.005") + max(0, cores - 4) * Decimal("0.0025")
    network = about["NetworkInfo"]
    most_pods = network["MaximumNetworkInterfaces"] * (network["Ipv4AddressesPerInterface"] - 1) + 2
    memory = about["MemoryInfo"]["SizeInMiB"] * (1 - _HIDDEN) - 255 - 11 * most_pods - 100
    accelerators = sum(gpu["Count"] for gpu in about.get("GpuInfo", {}).get("Gpus", []))
    return {"cpu": cores - kept, "memory": memory * _MI, "nvidia.com/gpu": Decimal(accelerators)}
