"""Every golden family of the methods that live here has a test; a new file of no family must not go unseen."""

from __future__ import annotations

import re
from pathlib import Path

from goldens import golden_files

TESTS = Path(__file__).resolve().parent
HOME = ("dc_", "trip_", "longer_", "metrics")  # families of what is here


def families_with_a_test() -> set[str]:
    """Families that tests name, by the beginnings of their files' names."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text()
        found |= set(re.findall(r"Family\(\s*\"(\w+)\"", text))
        found |= {name.rstrip("*_") for name in re.findall(r"golden_files\(\"sisters/([\w*]+)", text)}
    return found


def test_every_golden_family_has_a_test() -> None:
    prefixes = families_with_a_test()
    files = [path.name for pattern in HOME for path in golden_files(f"sisters/{pattern}*")]
    unseen = [name for name in files if not any(name.startswith(prefix) for prefix in prefixes)]
    assert not unseen, f"golden files of families without a test: {', '.join(sorted(unseen))}"
    assert {"dc_resampler", "dc_cfg_step"} <= prefixes
