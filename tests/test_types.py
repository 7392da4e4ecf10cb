"""Keyed randomness depends on its key alone; errors travel between processes whole."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from cinemo.types import ClipError, Condition, keyed_generator, keyed_seed

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


def test_a_condition_moves_as_one() -> None:
    condition = Condition(torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 6), torch.tensor([0.0, 19.0])).to(
        dtype=torch.bfloat16
    )
    assert {t.dtype for t in (condition.image_BCHW, condition.text_BLD, condition.motion_bucket_B)} == {torch.bfloat16}
