"""Quality by name or in dB: the cheapest measured way that is good enough, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.methods.cinemo import CinemoControls
from cinemo.methods.quality import MOST_DB, MOST_MOTION, QualityTable, Sampled, decibels
from cinemo.recipes import load_recipe
from cinemo.types import InputError

TINY = load_recipe("cinemo-tiny")


def way(passes: float, db: float, motion: float = 0.001, **other: Any) -> Sampled:
    known: dict[str, Any] = {"steps": 8, "solver": "ddim", "guidance_interval": (0.5, 1.0), "reuse_features": 1}
    return Sampled(**{**known, **other}, passes=passes, psnr=db + 1, psnr_low=db, motion=motion)


REFERENCE = way(75, MOST_DB, 0.0, steps=50)
TABLE = QualityTable.of(
    "d" * 64,
    3,
    [
        REFERENCE,
        way(9, 37),
        way(11, 43, motion=0.03),
        way(13, 44.4, steps=9),
        way(15, 42.7, steps=10),
        way(16.5, 49, steps=11, reuse_features=2),
    ],
)


@given(st.lists(st.tuples(st.floats(1, 70), st.floats(20, 99), st.floats(0, 0.05)), max_size=12), st.floats(1, 100))
def test_the_cheapest_good_way_is_chosen(measured: list[tuple[float, float, float]], wanted: float) -> None:
    rows = [REFERENCE, *(way(*each) for each in measured)]
    table = QualityTable.of("d", 1, rows)
    assert table.rows[-1] == REFERENCE
    assert QualityTable.from_json(table.to_json()) == table
    good = [row for row in rows if row.psnr_low >= wanted and row.motion <= MOST_MOTION]
    assert table.choose(f"{wanted!r}").passes == min(row.passes for row in good), "nothing that is left out was cheaper"
    assert table.choose("best") == REFERENCE


def test_a_quality_becomes_steps_and_says_what_is_predicted() -> None:
    for asked, steps in (("draft", 8), ("standard", 9), ("42", 9), (42, 9), ("48.5", 11), ("99", 50), ("best", 50)):
        controls = CinemoControls.of({"quality": asked, "seed": 3}, "tiny")
        settings = controls.calibrated(TINY, None, TABLE).settings(TINY)
        assert settings["steps"] == steps, asked
        assert "quality" not in settings
    assert settings["guidance_interval"] == [0.5, 1.0]
    asked = CinemoControls(quality="standard")
    said = asked.predicted(TINY, None, TABLE)["predicted_quality"]
    assert (said["asked"], said["psnr"], said["psnr_low"], said["motion_change"]) == ("standard", 45.4, 44.4, 0.001)
    assert (said["passes"], said["reference_steps"]) == (13, 50)
    assert CinemoControls(steps=5).predicted(TINY, None, TABLE) == {}
    both = CinemoControls(quality="standard", motion_strength=1.0).calibrated(TINY, None, TABLE).settings(TINY)
    assert (both["steps"], both["motion_bucket"]) == (9, 19)


@pytest.mark.parametrize("asked", ["good", "", "-3", "nan", "101", "1e9"])
def test_no_quality(asked: str) -> None:
    with pytest.raises(InputError, match="expected draft, standard, best, or a PSNR"):
        decibels(asked)
    with pytest.raises(InputError, match="quality"):
        CinemoControls.of({"quality": asked}, "tiny")


def test_quality_and_steps_exclude_each_other_and_need_a_table() -> None:
    for name, value in (("steps", 4), ("solver", "ddim"), ("reuse_features", 2), ("guidance_interval", (0.0, 1.0))):
        with pytest.raises(InputError, match=f"quality and {name} are both given"):
            CinemoControls.of({"quality": "draft", name: value}, "tiny")
    with pytest.raises(InputError, match=r"cinemo-tiny was not measured for it: run pipelines/evaluate\.py"):
        CinemoControls(quality="draft").calibrated(TINY, None)
