"""What machines, storage and requests cost: a JSON file of the user's, and the money a plan comes to."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import Field, ValidationError

from cinemo import storage
from cinemo.config import Part
from cinemo.types import InputError


class Prices(Part):
    """Prices in one currency; what is left out is not counted."""

    currency: str = "USD"
    core_hour: float | None = Field(None, ge=0, allow_inf_nan=False)
    accelerator_hour: float | None = Field(None, ge=0, allow_inf_nan=False)
    gb_month: float | None = Field(None, ge=0, allow_inf_nan=False)
    per_1000_put: float | None = Field(None, ge=0, allow_inf_nan=False)
    per_1000_get: float | None = Field(None, ge=0, allow_inf_nan=False)
    clips_per_accelerator_second: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="used where there is no accelerator to measure"
    )


def read_prices(uri: str) -> Prices:
    """
    Raises:
        InputError: no such file, no JSON object, an unknown key, or a value that is no price.
    """
    try:
        content = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"prices {uri}: no such file") from None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"prices {uri}: not JSON ({error})") from None
    known = ", ".join(Prices.model_fields)
    if not isinstance(values, dict):
        raise InputError(f"prices {uri}: a JSON {type(values).__name__}, expected an object with keys from {known}")
    try:
        return Prices.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{fault['loc'][0]}: "
            + (
                f"unknown key; known keys: {known}"
                if fault["type"] == "extra_forbidden"
                else f"{fault['msg']} (got {fault['input']!r})"
            )
            for fault in error.errors()
        ]
        raise InputError(f"prices {uri}: {'; '.join(faults)}") from None


def money(figures: Mapping[str, float], prices: Prices) -> dict[str, float]:
    """What the figures of a plan cost; an item is missing where its price or its figure is unknown."""
    items = {
        "cores": ("core_hours", prices.core_hour, 1.0),
        "accelerators": ("accelerator_hours", prices.accelerator_hour, 1.0),
        "puts": ("put_requests", prices.per_1000_put, 1e3),
        "gets": ("get_requests", prices.per_1000_get, 1e3),
    }
    costs = {
        item: figures[name] * price / unit
        for item, (name, price, unit) in items.items()
        if price is not None and name in figures
    }
    costs["total"] = sum(costs.values())
    if prices.gb_month is not None and "bytes" in figures:
        costs["storage_per_month"] = figures["bytes"] / 1e9 * prices.gb_month
    return costs
