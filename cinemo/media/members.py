"""Uris of what lies inside a container: how they are written, and what they name.

- ``CONTAINER.tar::MEMBER::OFFSET+SIZE``: bytes of an uncompressed tar, ``SIZE`` of them from ``OFFSET`` on.
- ``FILE.parquet::COLUMN::ROW``: bytes in a row (counted from 0 over the whole file) of a column, whose name may be
  dotted; of a struct its field ``bytes``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_BETWEEN = "::"
_TAR = re.compile(rf"(.+?\.tar){_BETWEEN}(.+){_BETWEEN}(\d+)\+(\d+)", re.DOTALL)
_PARQUET = re.compile(rf"(.+?\.parquet){_BETWEEN}(.+){_BETWEEN}(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A part of a container: ``span``, (offset, size), of a tar, or ``column`` and ``row`` of a Parquet file."""

    container: str
    name: str
    span: tuple[int, int] | None = None
    column: str = ""
    row: int = 0


def member(uri: str) -> Member | None:
    """What a uri names inside a container; None for a file of its own."""
    if match := _TAR.fullmatch(uri):
        container, name, offset, size = match.groups()
        return Member(container, name, span=(int(offset), int(size)))
    if match := _PARQUET.fullmatch(uri):
        container, column, row = match.groups()
        return Member(container, "", column=column, row=int(row))
    return None


def tar_uri(container: str, name: str, offset: int, size: int) -> str:
    """The uri of a member of a tar. Raises `ValueError` for a name that it cannot hold."""
    if _BETWEEN in name:
        raise ValueError(f"member {name}: {_BETWEEN!r} in a name; rename it")
    return f"{container}{_BETWEEN}{name}{_BETWEEN}{offset}+{size}"


def row_uris(container: str, column: str, rows: pa.Array) -> pa.Array:
    """The uris of some rows of a column of bytes in a Parquet file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(container, column, pc.cast(rows, pa.string()), _BETWEEN)
