"""Classifier-free guidance (arXiv 2207.12598) of any number of branches, as a generator around a sampler's queries."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cinemo.diffusion.ddim import Queries
from cinemo.types import Condition


class Query(NamedTuple):
    """What a network is to be asked: R rows of ``x``, all at step ``t``, each with its row of ``condition``.

    ``features``: "keep" what its inner layers make, or answer with those that were kept "again" (`reusing`).
    """

    x: Tensor
    t: int
    condition: Condition
    features: str = ""


Sampling = Generator[Query, Tensor, Tensor]
"""Yields what to ask, is sent the network's output, shaped like the query's x, and returns the video's latents."""


def guided(
    queries: Queries,
    branches: Sequence[Condition],
    scales: Sequence[float],
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
    ready: Callable[[Condition], Condition] = lambda condition: condition,
) -> Sampling:
    """A sampler's ``queries``, each answered by the guided output of ``branches``, all in one batch in their order.

    Args:
        branches: conditions from the least to the most that is told; the last one is what is asked for. Those of one
            row are told to every row of x.
        scales: one less than branches, see `combined`. Branches that the result does not depend on are not asked.
        interval: first and last diffusion step with guidance (arXiv 2404.07724); outside the last branch alone.
            None: guidance at every step.
        rescale: as `combined` has it.
        ready: what is to be made of a condition once for all steps that ask with it.
    """
    kept, between = needed(scales)
    asked: dict[tuple[tuple[int, ...], int], Condition] = {}
    x, t = next(queries)
    while True:
        outside = interval is not None and not interval[0] <= t <= interval[1]
        now = (len(branches) - 1,) if outside else kept
        if (now, len(x)) not in asked:
            told = [branches[branch] for branch in now]
            told = [each.expand(len(x)) if each.rows == 1 < len(x) else each for each in told]
            asked[now, len(x)] = ready(Condition.cat(told) if len(now) > 1 else told[0])
        if len(now) == 1:
            output = (yield Query(x, t, asked[now, len(x)])).to(x.dtype)
        else:
            outputs = yield Query(torch.cat([x] * len(now)), t, asked[now, len(x)])
            output = combined(outputs.to(x.dtype), between, rescale)
        try:
            x, t = queries.send(output)
        except StopIteration as end:
            result: Tensor = end.value
            return result


def reusing(sampling: Sampling, every: int) -> Sampling:
    """``sampling`` with the inner features of every ``every``-th call used again by those after it, while the number of
    rows stays the same and steps go down (DeepCache, arXiv 2312.00858)."""
    if every == 1:
        return (yield from sampling)
    query, calls, rows, before = next(sampling), 0, 0, 0
    while True:
        again = calls % every != 0 and len(query.x) == rows and query.t < before
        if not again:
            calls, rows = 0, len(query.x)
        calls, before = calls + 1, query.t
        output = yield query._replace(features="again" if again else "keep")
        try:
            query = sampling.send(output)
        except StopIteration as end:
            result: Tensor = end.value
            return result


def needed(scales: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Of branches 0..n, guided by ``scales`` 1..n, those that the result depends on, and the scales between them.

    The result is o_0 + sum s_i (o_i - o_(i-1)): a branch between two equal scales cancels out, as does the first where
    s_1 is 1, and the last where s_n is 0. ``needed((1.0,))`` is the conditional branch alone.
    """
    steps = (1.0, *scales, 0.0)
    kept = [branch for branch in range(len(scales) + 1) if steps[branch] != steps[branch + 1]]
    return tuple(kept), tuple(steps[branch] for branch in kept[1:])


def combined(branches: Tensor, scales: Sequence[float], rescale: float = 0.0) -> Tensor:
    """The guided output (B, ...) of n + 1 branches' ((n + 1) B, ...): o_0 + sum s_i (o_i - o_(i-1)), i = 1..n.

    With one scale that is classifier-free guidance; with two, the image's and the text's (arXiv 2310.12190).

    Args:
        rescale: share of the result that is brought back to the deviation of the last branch, sample by sample
            (arXiv 2305.08891, section 3.4): guidance widens the output, which overexposes the picture.
    """
    outputs = branches.chunk(len(scales) + 1)
    result = outputs[0]
    for scale, without, with_it in zip(scales, outputs, outputs[1:], strict=False):
        result = result + scale * (with_it - without)
    if rescale:
        deviations = [x.flatten(1).std(1).view(-1, *[1] * (x.dim() - 1)) for x in (outputs[-1], result)]
        result = rescale * (result * (deviations[0] / deviations[1])) + (1 - rescale) * result
    return result
