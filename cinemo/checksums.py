"""Checksums of a dataset's files: whether bytes are those that were written, and a name for them.

A checksum is a text: the algorithm and the digest in hex, ``blake3:0af1...``. Datasets begun before there was a choice
have sha256, whose digest stands alone and is stored under names of its own: ``sha256`` in the place of ``checksum``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from cinemo.types import InputError

BLAKE3, SHA256 = "blake3", "sha256"
DEFAULT = BLAKE3  # of new datasets; one core makes it about three times as fast as sha256


def checksum(pieces: Iterable[bytes | memoryview], algorithm: str = DEFAULT) -> str:
    """Of consecutive pieces of bytes.

    Raises:
        InputError: an unknown algorithm.
    """
    if algorithm not in (BLAKE3, SHA256):
        raise InputError(f"checksum algorithm {algorithm!r}: unknown here, expected {BLAKE3} or {SHA256}")
    if algorithm == SHA256:
        digest: Any = hashlib.sha256()
    else:
        from blake3 import blake3

        digest = blake3()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest()) if algorithm == SHA256 else f"{algorithm}:{digest.hexdigest()}"


def algorithm_of(checksum: str) -> str:
    return checksum.partition(":")[0] if ":" in checksum else SHA256


def brief(checksum: str) -> str:
    """For people: enough to tell two of them apart."""
    return f"{algorithm_of(checksum)} {checksum.rpartition(':')[2][:12]}..."


def entry(checksum: str, prefix: str = "") -> dict[str, str]:
    """As a record has it: under ``checksum``, or ``sha256``."""
    return {prefix + ("checksum" if ":" in checksum else SHA256): checksum}


def recorded(record: Mapping[str, Any], prefix: str = "") -> str:
    """The inverse of `entry`. Raises `KeyError` where a record has none."""
    name = f"{prefix}checksum"
    return str(record[name] if name in record else record[prefix + SHA256])
