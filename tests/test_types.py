"""Keyed randomness depends on its key alone; errors travel between processes whole."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cinemo.types import ClipError, Condition, InputError, LatentSample, check_schema, keyed_generator, keyed_seed

KEY = st.lists(st.one_of(st.text(max_size=8), st.integers(0, 1 << 30)), min_size=1, max_size=3)


@given(st.integers(0, 1 << 31), KEY)
def test_the_same_key_draws_the_same_numbers(seed: int, key: list[str | int]) -> None:
    first, second = (torch.rand(3, generator=keyed_generator(seed, *key)) for _ in range(2))
    assert torch.equal(first, second)


def test_keys_do_not_run_together() -> None:
    seeds = {
        keyed_seed(0, "ab", "c"),
        keyed_seed(0, "a", "bc"),
        keyed_seed(0, "abc"),
        keyed_seed(1, "abc"),
        keyed_seed(10, 1),
        keyed_seed(1, 0, 1),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_clip_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ClipError("decode", "too_few_frames", "12 frames, recipe needs 46")))
    assert (error.stage, error.reason, error.detail) == ("decode", "too_few_frames", "12 frames, recipe needs 46")


def condition(rows: int, value: float = 0.0) -> Condition:
    parts = {"deep": (torch.full((rows, 2), value), torch.full((rows, 3), value))}
    return Condition(image=torch.full((rows, 4, 8, 8), value), frame=torch.arange(rows), parts=parts)


def test_a_condition_moves_as_one() -> None:
    moved = condition(2).to(dtype=torch.bfloat16)
    assert isinstance(moved, Condition)
    assert {tensor.dtype for tensor in (moved["image"], *moved["parts"]["deep"])} == {torch.bfloat16}
    assert moved["frame"].dtype == torch.int64  # a number of something stays one


def test_rows_of_conditions_join_whatever_their_names() -> None:
    joined = Condition.cat([condition(2, 1.0), condition(1, 5.0)])
    assert joined["image"].flatten(1).mean(1).tolist() == [1, 1, 5]
    assert [part.shape for part in joined["parts"]["deep"]] == [(3, 2), (3, 3)]
    many = condition(1, 5.0).expand(3)
    assert many["image"].shape == (3, 4, 8, 8)
    assert many["parts"]["deep"][1].tolist() == [[5.0] * 3] * 3


def test_a_changed_sample_is_what_replace_gives() -> None:
    latents = np.zeros((2, 1, 1, 1), np.float16)
    sample = LatentSample("0", "clip", "/x", "caption", latents, 0.5, 24.0, 3, 0, extra={"a": 1})
    changed = sample.changed(key="1", ssim=1.0)
    assert changed == dataclasses.replace(sample, key="1", ssim=1.0)
    assert changed.extra is sample.extra
    assert sample.key == "0"


@pytest.mark.parametrize("found", [2, 0, "1", 1.5])
def test_a_later_format_is_refused(found: object) -> None:
    check_schema(None, 1, "bundle b")
    check_schema(1, 1, "bundle b")
    with pytest.raises(
        InputError, match=rf"bundle b: has format {found}, this version of cinemo reads up to 1; update"
    ):
        check_schema(found, 1, "bundle b")
