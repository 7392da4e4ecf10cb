"""How good a video is to be, by name or in dB, and the cheapest way to sample that was measured to give it.

A bundle's table is of that bundle alone (`cinemo.evaluation.quality` measures it): rows from the fewest passes to the
most, each with how far its videos were from those of the reference, which is the last row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from cinemo.types import InputError

NAMES: Mapping[str, float | None] = {"draft": 36.0, "standard": 42.0, "best": None}
"""The PSNR in dB to the reference that a name stands for; None: the reference itself."""
MOST_DB = 100.0
MOST_MOTION = 0.02  # by which the motion may differ from the reference's, 1 - mean SSIM of neighbouring frames


@dataclass(frozen=True)
class Sampled:
    """One way to sample, and what was measured of it.

    ``passes``: rows through the network in one video, as whole ones: a guided step is two, one that uses inner features
    again a part. ``psnr``: of frames after the first, in dB to the reference, mean over pictures; ``psnr_low``: the
    lowest of them. ``motion``: the largest change of motion, either way.
    """

    steps: int
    solver: Literal["ddim", "multistep"]
    guidance_interval: tuple[float, float]
    reuse_features: int
    passes: float
    psnr: float
    psnr_low: float
    motion: float

    @property
    def controls(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "solver": self.solver,
            "guidance_interval": self.guidance_interval,
            "reuse_features": self.reuse_features,
        }


@dataclass(frozen=True)
class QualityTable:
    """``bundle``: the digest that it was measured on. ``pictures``: how many."""

    bundle: str
    pictures: int
    rows: tuple[Sampled, ...]

    @classmethod
    def of(cls, bundle: str, pictures: int, measured: Sequence[Sampled]) -> Self:
        """With those rows alone that nothing cheaper is as good as, in PSNR and motion; the reference stays."""
        rows: list[Sampled] = []
        for row in sorted(measured, key=lambda row: (row.passes, -row.psnr_low)):
            if all(row.psnr_low > other.psnr_low for other in rows if other.motion <= max(row.motion, MOST_MOTION)):
                rows.append(row)
        return cls(bundle, pictures, tuple(rows))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_json` made. Raises ValueError, KeyError or TypeError: something else."""
        rows = [Sampled(**{**row, "guidance_interval": tuple(row["guidance_interval"])}) for row in stored["rows"]]
        passes = [row.passes for row in rows]
        if not rows or passes != sorted(passes) or not all(isinstance(each, int | float) for each in passes):
            raise ValueError("expected rows from the fewest passes to the most")
        return cls(stored["bundle"], int(stored["pictures"]), tuple(rows))

    def to_json(self) -> dict[str, Any]:
        return {"bundle": self.bundle, "pictures": self.pictures, "rows": [asdict(row) for row in self.rows]}

    def choose(self, asked: str) -> Sampled:
        """The row with the fewest passes that is as good as ``asked`` on every picture that was measured."""
        wanted = decibels(asked)
        if wanted is None:
            return self.rows[-1]
        good = (row for row in self.rows if row.psnr_low >= wanted and row.motion <= MOST_MOTION)
        return next(good, self.rows[-1])

    def predicted(self, asked: str) -> dict[str, Any]:
        """What is said beside a video: how far it will be from the reference, as far as was measured."""
        row = self.choose(asked)
        return {
            "asked": asked,
            "psnr": round(row.psnr, 1),
            "psnr_low": round(row.psnr_low, 1),
            "motion_change": round(row.motion, 4),
            "passes": round(row.passes, 1),
            "reference_steps": self.rows[-1].steps,
        }


def decibels(asked: str) -> float | None:
    """The PSNR that a name or number stands for; None: the reference.

    Raises:
        InputError: neither a name nor a number of dB.
    """
    if asked in NAMES:
        return NAMES[asked]
    try:
        value = float(asked)
    except ValueError:
        value = 0.0
    if not 1 <= value <= MOST_DB:
        raise InputError(f"quality is {asked[:32]!r}, expected {', '.join(NAMES)}, or a PSNR of 1..{MOST_DB:g} in dB")
    return value
