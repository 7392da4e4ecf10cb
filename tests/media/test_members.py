"""A uri of a member names what it was written from, whatever the names."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.media.members import Member, member, row_uris, tar_uri

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: ":" not in name)
SIZES = st.integers(0, 1 << 50)


@given(NAMES, NAMES, SIZES, SIZES)
def test_of_tars(place: str, name: str, offset: int, size: int) -> None:
    container = f"s3://{place}/x.tar"
    assert member(tar_uri(container, name, offset, size)) == Member(container, name, span=(offset, size))
    with pytest.raises(ValueError, match="'::' in a name; rename it"):
        tar_uri(container, f"{name}::{name}", offset, size)


@given(NAMES, NAMES, st.lists(SIZES, max_size=3))
def test_of_rows(place: str, column: str, rows: list[int]) -> None:
    container = f"/{place}/x.parquet"
    written = row_uris(container, f"{column}.bytes", pa.array(rows, pa.int64())).to_pylist()
    assert list(map(member, written)) == [Member(container, "", column=f"{column}.bytes", row=row) for row in rows]


def test_files_of_their_own_are_no_members() -> None:
    for uri in ("/a.tar", "/a.tar::b", "s3://b/a::b.mp4", "/a.parquet::column::x", "/a.mp4::m::1+2"):
        assert member(uri) is None
