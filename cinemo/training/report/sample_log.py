"""Which samples the weights have seen, in order: the proof that a training used every sample exactly once.

::

    <output>/order/from-00000100.jsonl   one line a step from step 100 to the next checkpoint: its sample ids

A part is written with each checkpoint, just before it, and what lies past the checkpoint that a run takes up is
removed: so the log always tells the samples that led to the weights, whatever was killed in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from cinemo import storage
from cinemo.types import RunError

DIRECTORY = "order"
_NAME = re.compile(r"from-(\d+)\.jsonl")


def write(output: str, keys_of_steps: Mapping[int, Sequence[str]]) -> None:
    """Write the part of some consecutive steps: the ids of each global batch in canonical order."""
    steps = sorted(keys_of_steps)
    if not steps:
        return
    assert steps == list(range(steps[0], steps[-1] + 1)), f"steps {steps[0]} to {steps[-1]} have gaps"
    lines = [json.dumps([step, *keys_of_steps[step]], separators=(",", ":"), ensure_ascii=False) for step in steps]
    storage.write_bytes(_uri(output, steps[0]), "".join(f"{line}\n" for line in lines).encode())


def cut(output: str, step: int) -> None:
    """Remove what was noted from ``step`` on: the weights of a run that goes on there have not seen it."""
    for first in _parts(output):
        if first >= step:
            storage.remove_file(_uri(output, first))


def read(output: str) -> dict[int, list[str]]:
    """Step -> its sample ids, in order of steps.

    Raises:
        RunError: a step is missing, or there twice.
    """
    found: dict[int, list[str]] = {}
    for first in _parts(output):
        for line in storage.read_bytes(_uri(output, first)).decode().splitlines():
            step, *keys = json.loads(line)
            expected = max(found) + 1 if found else first
            if step != expected:
                raise RunError(f"{_uri(output, first)}: step {step} follows {expected - 1}; the log is damaged")
            found[step] = keys
    return found


def _parts(output: str) -> list[int]:
    names = storage.names(storage.join(output, DIRECTORY))
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _uri(output: str, first: int) -> str:
    return storage.join(output, DIRECTORY, f"from-{first:08d}.jsonl")
