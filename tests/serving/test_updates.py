"""What an animator and its settings make of adapters, without Ray."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_adapter, tiny_bundle

from cinemo.bundle import ModelBundle
from cinemo.networks import adapters
from cinemo.serving.app import Animator
from cinemo.serving.ingress import Served
from cinemo.serving.settings import ServeSettings, served_card
from cinemo.types import InputError


def animator_of(settings: ServeSettings, swapped: list[ModelBundle]) -> Any:
    """One whose runner only notes what it is given."""
    animator: Any = object.__new__(Animator)
    animator._settings, animator._updates, animator._asked = settings, threading.Lock(), 1
    animator._served = Served("w", None, settings.bundle, served_card(settings.bundle, settings))
    animator._runner = type(
        "Runner", (), {"swap": lambda _, bundle: swapped.append(bundle), "close": lambda *_: None}
    )()
    return animator


def test_adapters_that_changed_in_their_place_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    settings = ServeSettings(bundle=str(tiny_bundle(tmp_path)), lora=str(tmp_path / "lora"), max_batch=1)
    swapped: list[ModelBundle] = []
    animator = animator_of(settings, swapped)
    animator._update(settings.bundle, 1)
    assert not swapped
    tiny_adapter(tmp_path / "encoders", tmp_path / "lora" / "snow")
    animator._update(settings.bundle, 1)
    assert [list(bundle.adapters.found) for bundle in swapped] == [["snow"]]
    assert animator._served.card.weights == served_card(settings.bundle, settings).weights
    animator._update(settings.bundle, 1)
    assert len(swapped) == 1


def test_bad_adapters_are_found_before_anything_is_started(tmp_path: Path) -> None:
    settings = ServeSettings(bundle=str(tiny_bundle(tmp_path, compiled=True)), lora=str(tmp_path / "lora"))
    tiny_adapter(tmp_path / "encoders", tmp_path / "lora" / "snow")
    with pytest.raises(InputError, match="compiled, which no adapter is"):
        served_card(settings.bundle, settings)
    about = tmp_path / "lora" / "snow" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"r": 0}))
    with pytest.raises(InputError, match=r"adapter snow: .* cannot be read"):
        adapters.load(tmp_path / "lora")
