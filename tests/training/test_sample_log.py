"""The log of samples tells those that led to the weights, whatever was killed in between."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo import storage
from cinemo.training.report import sample_log
from cinemo.types import RunError


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.booleans()), max_size=8))
def test_any_interruptions_leave_one_line_a_step(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int, bool]]
) -> None:
    """Each life makes some checkpoints two steps apart and dies: before the last one's commit or after it."""
    output, committed = str(tmp_path_factory.mktemp("run")), 0
    for checkpoints, steps_lost, before_commit in lives:
        sample_log.cut(output, committed)
        for number in range(checkpoints):
            steps = range(committed, committed + 2)
            sample_log.write(output, {step: [f"k{step}-a", f"k{step}-b"] for step in steps})
            if number + 1 < checkpoints or not before_commit:
                committed += 2
        assert steps_lost >= 0  # steps after a checkpoint leave no trace
    sample_log.cut(output, committed)
    assert sample_log.read(output) == {step: [f"k{step}-a", f"k{step}-b"] for step in range(committed)}


def test_a_gap_is_named(tmp_path: Path) -> None:
    for first in (0, 2, 4):
        sample_log.write(str(tmp_path), {first: ["a"], first + 1: ["b"]})
    storage.remove(str(tmp_path / "order" / "from-00000002.jsonl"))
    with pytest.raises(RunError, match="step 4 follows 1"):
        sample_log.read(str(tmp_path))
