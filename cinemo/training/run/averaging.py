"""Adam that also keeps an exponential moving average of the weights, as one more state of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

EMA = "ema"


class AveragingAdam(torch.optim.Adam):
    """`torch.optim.Adam` whose state has ``ema`` beside the two moments.

    Whoever shards, offloads or stores the optimiser's state so does the same to the averages: under DeepSpeed they
    average the float32 master weights, and no rank holds more than its share.

    The decay of step n (the first is 1) is min(``decay``, (n - 1) / (n + 8)): it begins at 0, so that neither the
    initial weights nor a resumed step count leave a trace, and passes 0.99 after 900 steps.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], decay: float, **settings: Any
    ) -> None:
        super().__init__(parameters, **settings)
        self.decay = decay

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss: float | None = super().step(closure)
        moved: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is None or "step" not in state:
                    continue
                if EMA not in state:
                    state[EMA] = parameter.detach().clone()
                averages, weights = moved.setdefault(self._weight_of_new(state), ([], []))
                averages.append(state[EMA])
                weights.append(parameter.detach())
        with torch.no_grad():
            for share, (averages, weights) in moved.items():
                torch._foreach_lerp_(averages, weights, share)
        return loss

    def _weight_of_new(self, state: dict[str, Any]) -> float:
        count = float(state["step"])
        return 1 - min(self.decay, (count - 1) / (count + 8))
