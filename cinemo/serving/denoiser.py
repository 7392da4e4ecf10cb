"""Stand-in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle


@dataclass(frozen=True)
class Outcome:
    finished: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)


class Denoiser:
    def __init__(self, bundle: ModelBundle, max_batch: int = 4) -> None:
        self._bundle, self._jobs = bundle, dict[str, AnimateRequest]()

    def join(self, key: str, request: AnimateRequest) -> int:
        self._jobs[key] = request
        return 1

    def step(self) -> Outcome:
        return Outcome({key: animate(self._bundle, request) for key, request in self._jobs.items()})
