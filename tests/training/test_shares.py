"""What ranks wrote in pieces is read in any other pieces, bit for bit; what is not there is refused."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cinemo.training.checkpoint import shares
from cinemo.training.checkpoint.shares import STATE, WEIGHT, Fragment, Memory, Shares, Snapshot
from cinemo.types import RunError

SHAPES = {"a.weight": (5, 7), "b.weight": (64,), "c.bias": (1,), "empty": (3, 0)}


def _values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def _store(directory: Path, cuts: dict[str, list[int]], world: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters cut at ``cuts``, the pieces dealt to ranks in order."""
    whole, mine = _values(dtype), [[] for _ in range(world)]
    for name, shape in SHAPES.items():
        flat = whole[name].view(-1)
        bounds = sorted({0, len(flat), *(cut % (len(flat) + 1) for cut in cuts[name][: world - 1])})
        for rank, (begin, end) in enumerate(itertools.pairwise(bounds)):
            values = {WEIGHT: flat[begin:end], "exp_avg": -flat[begin:end].float()}
            mine[rank].append(Fragment(name, shape, begin, values))
    for rank, fragments in enumerate(mine):
        Snapshot(rank, fragments, None if rank else {"step": 3}).write(directory)
    return whole


@settings(max_examples=50)
@given(
    world=st.integers(1, 4),
    cuts=st.fixed_dictionaries({name: st.lists(st.integers(0, 100), min_size=3, max_size=3) for name in SHAPES}),
    window=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_range_of_any_cut(
    world: int, cuts: dict[str, list[int]], window: tuple[float, float], dtype: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as place:
        whole = _store(Path(place), cuts, world, dtype)
        with Shares(Path(place) / STATE) as stored:
            assert stored.record == {"step": 3}
            for name, shape in SHAPES.items():
                flat = whole[name].view(-1)
                begin, end = sorted(round(bound * len(flat)) for bound in window)
                for out in (torch.full((end - begin,), 9.0), torch.full((end - begin,), 9.0, dtype=torch.bfloat16)):
                    if name == "empty":
                        continue
                    stored.read(WEIGHT, name, shape, out, begin)
                    assert torch.equal(out, flat[begin:end].to(out.dtype))
                    stored.read("exp_avg", name, shape, out, begin)
                    assert torch.equal(out, -flat[begin:end].to(out.dtype))


def test_the_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    whole = _store(tmp_path, {name: [2, 3, 4] for name in SHAPES}, 1, torch.bfloat16)
    with safe_open(tmp_path / STATE / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight/a.weight"), whole["a.weight"].view(-1))


def test_a_snapshot_is_what_there_was_when_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that cut values in two, and in memory that an earlier, larger one has filled."""
    monkeypatch.setattr(shares, "BLOCK", 64)
    memory, values = Memory(), torch.arange(1000, dtype=torch.float32)
    for step, count in enumerate((1000, 333)):
        halves = values[:count].bfloat16()
        fragments = [
            Fragment("a", (7,), 0, {WEIGHT: halves[:7]}),
            Fragment("b", (count,), 0, {WEIGHT: values[:count] + step, "exp_avg": halves}),
        ]
        taken = Snapshot(0, fragments, {"step": step}, memory)
        fragments[1].values[WEIGHT].zero_()
        taken.write(tmp_path / f"{step}")
        written = tmp_path / f"{step}" / STATE
        assert taken.sizes == {f"{STATE}/{file.name}": file.stat().st_size for file in written.iterdir()}
        with Shares(written) as stored:
            assert stored.record == {"step": step}
            for key, expected in ((WEIGHT, values[:count] + step), ("exp_avg", halves.float())):
                out = torch.empty(count)
                stored.read(key, "b", (count,), out)
                assert torch.equal(out, expected)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold a training state"):
        Shares(tmp_path / STATE)
    _store(tmp_path, {name: [10] for name in SHAPES}, 2, torch.float32)
    out = torch.empty(35)
    with Shares(tmp_path / STATE) as stored:
        assert stored.has("exp_avg", "a.weight")
        assert not stored.has("ema", "a.weight")
        with pytest.raises(RunError, match=r"holds 0 of the values 0\.\.35 of ema/a\.weight"):
            stored.read("ema", "a.weight", (5, 7), out)
        with pytest.raises(RunError, match=r"a\.weight is of shape \(5, 7\), expected \(7, 5\)"):
            stored.read(WEIGHT, "a.weight", (7, 5), out)
        with pytest.raises(RunError, match=r"d\.weight is missing, expected \(7, 5\)"):
            stored.read(WEIGHT, "d.weight", (7, 5), out)
    (tmp_path / STATE / "rank-00001.safetensors").unlink()
    with Shares(tmp_path / STATE) as stored, pytest.raises(RunError, match=r"holds 10 of the values 0\.\.35"):
        stored.read(WEIGHT, "a.weight", (5, 7), out)
    path = tmp_path / STATE / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with Shares(tmp_path / STATE) as stored, pytest.raises(RunError, match="is cut short"):
        stored.read("exp_avg", "c.bias", (1,), torch.empty(1))
