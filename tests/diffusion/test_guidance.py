from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cinemo.config import DiffusionConfig
from cinemo.diffusion.ddim import Queries, ddim_steps
from cinemo.diffusion.guidance import Query, Sampling, combined, guided, needed, reusing
from cinemo.diffusion.schedule import noise_schedule
from cinemo.types import Condition

CONDITION = Condition(image=torch.randn(2, 4, 3, 3), text=torch.randn(2, 5, 6), motion_bucket=torch.tensor([3.0, 9.0]))
WITHOUT_TEXT = Condition(CONDITION, text=torch.randn(2, 5, 6))


def predict(x: Tensor, t: int, condition: Condition) -> Tensor:
    per_item = condition["text"].mean((1, 2)) + condition["image"].mean((1, 2, 3)) + condition["motion_bucket"]
    return x * t + per_item.view(-1, 1, 1, 1, 1)


def one_step(x: Tensor, t: int) -> Queries:
    """A sampler of a single query, whose result is the answer to it."""
    return (yield x, t)


def answer(sampling: Sampling, seen: list[Query] | None = None) -> Tensor:
    """What ``sampling`` returns when `predict` answers it."""
    query = next(sampling)
    while True:
        if seen is not None:
            seen.append(query)
        try:
            query = sampling.send(predict(query.x, query.t, query.condition))
        except StopIteration as end:
            return end.value


def test_branches_are_asked_in_one_batch_and_combined() -> None:
    x, seen = torch.randn(2, 4, 3, 3, 3), []
    unconditional, conditional = predict(x, 3, WITHOUT_TEXT), predict(x, 3, CONDITION)
    expected = unconditional + 7.5 * (conditional - unconditional)
    got = answer(guided(one_step(x, 3), (WITHOUT_TEXT, CONDITION), (7.5,)), seen)
    torch.testing.assert_close(got, expected)
    (query,) = seen
    assert query.x.shape == (4, 4, 3, 3, 3)
    assert torch.equal(query.condition["text"], torch.cat([WITHOUT_TEXT["text"], CONDITION["text"]]))
    assert query.condition["motion_bucket"].tolist() == [3, 9, 3, 9]


def test_scale_one_is_a_single_conditional_pass() -> None:
    x, seen = torch.randn(2, 4, 3, 3, 3), []
    assert torch.equal(
        answer(guided(one_step(x, 5), (WITHOUT_TEXT, CONDITION), (1.0,)), seen), predict(x, 5, CONDITION)
    )
    assert len(seen[0].x) == 2
    barely = answer(guided(one_step(x, 5), (WITHOUT_TEXT, CONDITION), (1 + 1e-6,)))
    torch.testing.assert_close(barely, predict(x, 5, CONDITION), rtol=1e-4, atol=1e-4)


def test_outside_its_interval_guidance_is_a_single_conditional_pass() -> None:
    x, branches = torch.randn(2, 4, 3, 3, 3), (WITHOUT_TEXT, CONDITION)
    for t in (100, 700):
        assert torch.equal(answer(guided(one_step(x, t), branches, (7.5,), (200, 600))), predict(x, t, CONDITION))
    for t in (200, 600):
        inside = answer(guided(one_step(x, t), branches, (7.5,), (200, 600)))
        assert torch.equal(inside, answer(guided(one_step(x, t), branches, (7.5,))))


def test_a_condition_is_made_ready_once() -> None:
    made: list[int] = []

    def ready(condition: Condition) -> Condition:
        made.append(len(condition["text"]))
        return condition

    queries = ddim_steps(torch.randn(2, 4, 3, 3, 3), noise_schedule(DiffusionConfig()), 10)
    answer(guided(queries, (WITHOUT_TEXT, CONDITION), (2.0,), (200, 600), ready=ready))
    assert made == [2, 4]  # the conditional branch alone comes first, at much noise


@given(st.integers(1, 4), st.integers(1, 12))
def test_every_nth_call_keeps_features_and_the_others_use_them(every: int, steps: int) -> None:
    seen: list[Query] = []
    queries = ddim_steps(torch.randn(2, 4, 2, 3, 3), noise_schedule(DiffusionConfig()), steps)
    answer(reusing(guided(queries, (CONDITION,), ()), every), seen)
    expected = ["" if every == 1 else "again" if number % every else "keep" for number in range(steps)]
    assert [query.features for query in seen] == expected


def test_features_are_kept_anew_when_the_number_of_rows_changes() -> None:
    seen: list[Query] = []
    queries = ddim_steps(torch.randn(2, 4, 2, 3, 3), noise_schedule(DiffusionConfig()), 10)
    answer(reusing(guided(queries, (WITHOUT_TEXT, CONDITION), (2.0,), (200, 600)), 3), seen)
    for before, after in itertools.pairwise(seen):
        if len(before.x) != len(after.x):
            assert after.features == "keep"
    assert {query.features for query in seen} == {"keep", "again"}


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
