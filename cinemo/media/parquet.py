"""Videos that are stored in Parquet: the bytes in one row of a column.

A row's page must be read from its beginning, and its row group up to it. So the place is kept between calls: rows that
are asked for in ascending order, as a manifest has them, cost one pass over their row group.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cinemo import storage
from cinemo.ranges import RangedFile
from cinemo.types import ClipError

# A column of a row group that is smaller is one request.
_READ_BYTES = 32 << 20


def read_row(uri: str, container: str, version: str, column: str, row: int) -> bytes:
    """The bytes in a row (from 0, over the whole file) of a column; of a struct its field ``bytes``.

    Args:
        uri: what errors name.
        version: the container's `storage.version`.

    Raises:
        ClipError: of stage ``open``: ``missing`` (no such column or row, or nothing in it), ``unreadable``.
        FileNotFoundError: there is no such file.
    """
    import pyarrow as pa

    try:
        content = _opened(container, version, column).read(row)
    except _Absent as fault:
        raise ClipError("open", "missing", f"{uri}: {fault}") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OSError) as error:
        _opened.cache_clear()
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClipError("open", "unreadable", f"{uri}: {text}") from None
    except BaseException:
        _opened.cache_clear()
        raise
    if content is None:
        raise ClipError("open", "missing", f"{uri}: that row holds nothing")
    return content


class _Absent(Exception):
    """The file has no such column or row."""


class _Column:
    """The rows of one column, cheapest in ascending order."""

    def __init__(self, container: str, column: str) -> None:
        import pyarrow.parquet as pq

        # Pages are read as they are needed: a whole column chunk in memory would be gigabytes in a careless file.
        self._file = pq.ParquetFile(_open(container), buffer_size=_READ_BYTES, pre_buffer=False)
        meta = self._file.metadata
        self._ends = list(itertools.accumulate(meta.row_group(k).num_rows for k in range(meta.num_row_groups)))
        self._names = _leaf(self._file.schema_arrow, column)
        self._group, self._next = -1, 0
        self._rows: Iterator[Any] = iter(())

    def read(self, row: int) -> bytes | None:
        group = bisect.bisect_right(self._ends, row)
        if group == len(self._ends):
            raise _Absent(f"it has {self._ends[-1] if self._ends else 0} rows")
        if group != self._group or row < self._next:
            self._group, self._next = group, self._ends[group - 1] if group else 0
            self._rows = self._file.iter_batches(1, row_groups=[group], columns=[".".join(self._names)])
        batch = next(itertools.islice(self._rows, row - self._next, None))
        self._next = row + 1
        value = batch.column(0)[0].as_py()
        for name in self._names[1:]:
            value = value and value[name]
        return value if value is None else bytes(value)


@functools.lru_cache(maxsize=1)
def _opened(container: str, version: str, column: str) -> _Column:
    return _Column(container, column)


def _leaf(schema: Any, column: str) -> list[str]:
    """The path of the binary field that a column's name stands for."""
    import pyarrow as pa

    names = [column] if column in schema.names else column.split(".")
    kind: Any = pa.struct(list(schema))
    for name in names:
        place = kind.get_field_index(name) if pa.types.is_struct(kind) else -1
        if place < 0:
            raise _Absent(f"it has no column {column}, but {', '.join(schema.names)}")
        kind = kind.field(place).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        names, kind = [*names, "bytes"], kind.field("bytes").type
    if "binary" not in str(kind):
        raise pa.ArrowTypeError(f"column {column} is {kind}, expected binary, or a struct with a binary field bytes")
    return names


def _open(container: str) -> Any:
    import pyarrow as pa

    if not storage.is_remote(container):
        return pa.OSFile(str(storage.local_path(container)))
    return pa.PythonFile(RangedFile(container, storage.size(container)), "r")
