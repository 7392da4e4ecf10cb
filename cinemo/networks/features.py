"""Inner features of a network that nearby steps may share."""

from __future__ import annotations

from torch import Tensor

OUTER_SHARE = 0.3
"""Of a whole pass, what one costs that runs the outermost layers alone; about, as measured in BENCHMARKS.md."""


class DeepFeatures:
    """What the inner layers made in one call, for calls at nearby steps to use again (DeepCache, arXiv 2312.00858).

    A call that finds ``kept`` None runs everything and fills it; later ones run the outermost ``depth`` layers alone.

    Args:
        depth: 1: the input convolution and the last layer; 2: also the first layer and the last but one; and so on,
            inside the outermost level.
    """

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.kept: Tensor | None = None
