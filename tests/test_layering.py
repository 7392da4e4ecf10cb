"""The layering of ARCHITECTURE.md, enforced: which room may import which, and where a library may be named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import modules of its own layer or of one before it.
LAYERS = [
    ["types"],
    ["config", "s3", "storage", "cache", "tracking"],
    ["diffusion", "media"],
    ["networks"],
    ["methods"],
    ["recipes", "bundle", "animate", "data"],
    ["training", "evaluation", "serving"],
    ["cli"],
    ["pipelines"],
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# Top-level import name -> the only modules that may name it.
ONLY_IN = {
    "ray": ["data.precompute", "training.run.rank", "training.run.worker", "serving.app", "pipelines"],
    "deepspeed": ["training.run.engine"],
    "mlflow": ["tracking"],
    "s3fs": ["s3"],
    "fsspec": ["s3"],
    "boto3": ["s3"],
    "decord": ["media.video"],
    "av": ["media.timeline", "media.video", "media.mp4"],
    "webdataset": ["data.dataset.shards", "data.loading.loader"],
    "diffusers": ["diffusion.multistep", "networks.frozen", "networks.weights", "training.checkpoint.export"],
    "transformers": ["networks.frozen", "networks.weights", "training.checkpoint.export"],
    "fastapi": ["serving.http", "serving.page", "serving.app"],
    "sqlalchemy": ["serving.store"],
    "psycopg": ["serving.store.database"],
    "httpcore": ["serving.http.fetch"],
    "prometheus_client": ["serving.http.exposition"],
    "kornia": ["media.motion"],
    "matplotlib": ["evaluation"],
}


def module_name(path: Path) -> str:
    """``cinemo/data/plan.py`` -> ``data.plan``; ``pipelines/train.py`` -> ``pipelines.train``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "cinemo" else parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module of a file with its line, imports inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the room in full"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def broken_rules(path: Path) -> list[str]:
    module = module_name(path)
    room = module.split(".")[0]
    found = []
    for line, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        if name.startswith("cinemo.") and room:
            other = name.split(".")[1]
            if other in RANK and RANK[other] > RANK[room]:
                found.append(f"{where}: {room} may not import {other}")
        if room != "pipelines" and name.split(".")[0] in ("pipelines", "tools", "benchmarks"):
            found.append(f"{where}: the library may not import {name.split('.')[0]}")
        for library, homes in ONLY_IN.items():
            inside = any(module == home or module.startswith(home + ".") for home in homes)
            if (name == library or name.startswith(library + ".")) and not inside:
                found.append(f"{where}: {library} belongs in {', '.join(homes)}")
    return found


SOURCES = sorted([*ROOT.glob("cinemo/**/*.py"), *ROOT.glob("pipelines/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_leftward(path: Path) -> None:
    assert not broken_rules(path)


def test_every_room_has_a_layer() -> None:
    rooms = {path.relative_to(ROOT / "cinemo").parts[0].removesuffix(".py") for path in ROOT.glob("cinemo/**/*.py")}
    assert rooms - {"__init__", "assets"} <= set(RANK)


def test_the_rules_catch_a_late_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = tmp_path / "cinemo" / "media" / "motion.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "def f():\n    import ray.data\n    from cinemo.training import loop\n    import tools.tiny_base\n"
    )
    assert broken_rules(source) == [
        f"cinemo/media/motion.py:2: ray belongs in {', '.join(ONLY_IN['ray'])}",
        "cinemo/media/motion.py:3: media may not import training",
        "cinemo/media/motion.py:3: media may not import training",
        "cinemo/media/motion.py:4: the library may not import tools",
    ]
