"""Adam that also keeps averages of the weights, as further states of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cinemo.training.checkpoint.profiles import exponent, share_of_new

EMA = "ema"


def power_average(width: float) -> str:
    """The state that holds the power-function average of a width."""
    return f"power_{width:g}"


class AveragingAdam(torch.optim.Adam):
    """`torch.optim.Adam` whose state has averages of the weights beside the two moments.

    Whoever shards, offloads or stores the optimiser's state so does the same to the averages: under DeepSpeed they
    average the float32 master weights, and no rank holds more than its share.

    Args:
        decay: of the exponential average ``ema``; None: there is none. That of step n (the first is 1) is
            min(``decay``, (n - 1) / (n + 8)): it begins at 0, so that neither the initial weights nor a resumed step
            count leave a trace, and passes 0.99 after 900 steps.
        widths: of power-function averages (`cinemo.training.checkpoint.profiles`).

    ``averages``: names of the states that are averages, those to be shown and exported first.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        decay: float | None = None,
        widths: Sequence[float] = (),
        **settings: Any,
    ) -> None:
        super().__init__(parameters, **settings)
        shares: dict[str, Callable[[float], float]] = {} if decay is None else {EMA: partial(_exponential, decay)}
        self._shares = shares | {power_average(width): partial(share_of_new, g=exponent(width)) for width in widths}
        self.averages = tuple(self._shares)
        # The states have them too, but may lie on a device, which would be waited for at every step.
        self._counts: dict[Tensor, int] = {}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss: float | None = super().step(closure)
        moved: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is None or "step" not in state:
                    continue
                count = self._count(parameter, state)
                for name, share_of in self._shares.items():
                    if name not in state:
                        state[name] = parameter.detach().clone()
                    averages, weights = moved.setdefault(share_of(count), ([], []))
                    averages.append(state[name])
                    weights.append(parameter.detach())
        with torch.no_grad():
            for share, (averages, weights) in moved.items():
                torch._foreach_lerp_(averages, weights, share)
        return loss

    def recount(self) -> None:
        """Forget how many steps were counted: states were filled from elsewhere."""
        self._counts.clear()

    def _count(self, parameter: Tensor, state: dict[str, Any]) -> int:
        """Steps of a parameter, the one just done included."""
        known = self._counts.get(parameter) if self.averages[0] in state else None
        self._counts[parameter] = int(state["step"]) if known is None else known + 1
        return self._counts[parameter]


def _exponential(decay: float, count: float) -> float:
    return 1 - min(decay, (count - 1) / (count + 8))
