from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cinemo.diffusion.guidance import combined, guided, needed
from cinemo.types import Condition, InputError

CONDITION = Condition(torch.randn(2, 4, 3, 3), torch.randn(2, 5, 6), torch.tensor([3.0, 9.0]))
NEGATIVE = torch.randn(2, 5, 6)


def predict(x: Tensor, t: int, condition: Condition) -> Tensor:
    per_item = condition.text_BLD.mean((1, 2)) + condition.image_BCHW.mean((1, 2, 3)) + condition.motion_bucket_B
    return x * t + per_item.view(-1, 1, 1, 1, 1)


def test_branches_differ_in_text_only_and_are_combined() -> None:
    x = torch.randn(2, 4, 3, 3, 3)
    without_text = Condition(CONDITION.image_BCHW, NEGATIVE, CONDITION.motion_bucket_B)
    unconditional, conditional = predict(x, 3, without_text), predict(x, 3, CONDITION)
    expected = unconditional + 7.5 * (conditional - unconditional)
    torch.testing.assert_close(guided(predict, CONDITION, NEGATIVE, 7.5)(x, 3), expected)


def test_unconditional_branch_comes_first() -> None:
    seen: list[Condition] = []

    def spy(x: Tensor, t: int, condition: Condition) -> Tensor:
        seen.append(condition)
        return x

    guided(spy, CONDITION, NEGATIVE, 2.0)(torch.randn(2, 4, 1, 3, 3), 1)
    assert torch.equal(seen[0].text_BLD, torch.cat([NEGATIVE, CONDITION.text_BLD]))
    assert torch.equal(seen[0].motion_bucket_B, torch.tensor([3.0, 9.0, 3.0, 9.0]))


def test_scale_one_is_a_single_conditional_pass() -> None:
    x = torch.randn(2, 4, 3, 3, 3)
    assert torch.equal(guided(predict, CONDITION, None, 1.0)(x, 5), predict(x, 5, CONDITION))
    barely = guided(predict, CONDITION, NEGATIVE, 1 + 1e-6)(x, 5)
    torch.testing.assert_close(barely, predict(x, 5, CONDITION), rtol=1e-4, atol=1e-4)


def test_guidance_needs_a_negative_prompt() -> None:
    with pytest.raises(InputError, match="negative"):
        guided(predict, CONDITION, None, 7.5)


def test_outside_its_interval_guidance_is_a_single_conditional_pass() -> None:
    x = torch.randn(2, 4, 3, 3, 3)
    denoise = guided(predict, CONDITION, NEGATIVE, 7.5, (200, 600))
    for t in (100, 700):
        assert torch.equal(denoise(x, t), predict(x, t, CONDITION))
    for t in (200, 600):
        assert torch.equal(denoise(x, t), guided(predict, CONDITION, NEGATIVE, 7.5)(x, t))


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 7.5]), min_size=1, max_size=4))
def test_branches_that_cancel_out_are_not_needed(scales: list[float]) -> None:
    outputs = torch.randn(len(scales) + 1, 2, 3, dtype=torch.float64)
    kept, between = needed(scales)
    fewer = combined(outputs[list(kept)].flatten(0, 1), between)
    torch.testing.assert_close(fewer, combined(outputs.flatten(0, 1), scales))
    assert len(kept) == 1 + len(between)
    assert 1.0 not in between[:1]
    assert 0.0 not in between[-1:]


def test_one_scale_asks_for_what_it_must() -> None:
    assert needed((7.5,)) == ((0, 1), (7.5,))
    assert needed((1.0,)) == ((1,), ())
    assert needed((0.0,)) == ((0,), ())
    assert needed((7.5, 7.5)) == ((0, 2), (7.5,))  # of image and text alike: two calls instead of three


def test_rescaled_outputs_have_the_deviation_of_the_last_branch() -> None:
    outputs = torch.randn(2, 3, 4, 5, 6) * torch.tensor([1.0, 4.0]).view(2, 1, 1, 1, 1)
    branches = outputs.flatten(0, 1)
    plain, full = combined(branches, (7.5,)), combined(branches, (7.5,), 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), outputs[1].flatten(1).std(1))
    torch.testing.assert_close(combined(branches, (7.5,), 0.3), 0.3 * full + 0.7 * plain)
