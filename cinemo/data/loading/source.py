"""What a training is told of a dataset. Imports nothing that is slow to load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Self

from cinemo.types import InputError

_WEIGHT = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_DIGITS = 40  # of a weight; no sum of weights is then beyond a float


@dataclass(frozen=True)
class Source:
    """A dataset of a training: its URI, its weight beside the others, and whether its clips are shown as stills."""

    uri: str
    weight: Fraction = Fraction(1)
    still: bool = False

    @classmethod
    def parse(cls, text: str, still: bool = False) -> Self:
        """``URI`` or ``URI=WEIGHT``.

        Raises:
            InputError: the weight is 0, or has more digits than anybody means.
        """
        found = _WEIGHT.fullmatch(text)
        if found is None:
            return cls(text, still=still)
        if len(found[2]) > _DIGITS:
            raise InputError(
                f"--data {found[1]}: the weight has {len(found[2])} characters, expected at most {_DIGITS}"
            )
        weight = Fraction(found[2])
        if not weight:
            raise InputError(f"--data {text}: the weight is 0, expected more; leave the dataset out instead")
        return cls(found[1], weight, still)

    @property
    def flags(self) -> list[str]:
        """What train.py is given for it."""
        weight = Decimal(self.weight.numerator) / Decimal(self.weight.denominator)
        return ["--stills" if self.still else "--data", f"{self.uri}={weight:f}"]

    def __str__(self) -> str:
        return f"{float(self.weight):g} x {self.uri}" + (" as stills" if self.still else "")
