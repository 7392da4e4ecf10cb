"""The layering of ARCHITECTURE.md, enforced: which room may import which, and where a library may be named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from cinemo.methods import method_named
from cinemo.methods.controls import Controls
from cinemo.methods.sampling_controls import FastSampling, LongVideo
from cinemo.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent

# A module may import modules of its own layer or of one before it.
LAYERS = [
    ["client"],
    ["types"],
    [
        "progress",
        "diagnostics",
        "accelerators",
        "checksums",
        "config",
        "s3",
        "clouds",
        "web",
        "storage",
        "ranges",
        "compare_and_swap",
        "lock",
        "cache",
        "tracking",
        "monitoring",
    ],
    ["diffusion", "media"],
    ["networks"],
    ["methods"],
    ["recipes", "bundle", "animate", "data"],
    ["training", "evaluation", "serving"],
    ["cli", "command"],
    ["pipelines"],
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# Top-level import name -> the only modules that may name it.
ONLY_IN = {
    "ray": [
        "monitoring",
        "evaluation.cluster",
        "data.precompute",
        "training.run.rank",
        "training.run.worker",
        "serving.app",
        "serving.ingress",
        "pipelines",
    ],
    "deepspeed": ["training.run.engine"],
    "bitsandbytes": ["training.run.adam8bit"],
    "tensorboardX": ["training.report.board"],
    "mlflow": ["tracking"],
    "s3fs": ["s3"],
    "fsspec": ["s3", "clouds"],
    "boto3": ["s3"],
    "decord": ["media.video"],
    "torchvision": ["networks.raft"],
    "av": ["media.timeline", "media.fitting", "media.video", "media.mp4"],
    "webdataset": ["data.dataset.shards", "data.loading.loader"],
    "diffusers": [
        "diffusion.multistep",
        "networks.frozen",
        "networks.vae_cost",
        "networks.weights",
        "training.checkpoint.export",
    ],
    "transformers": [
        "evaluation.extractors",
        "networks.frozen",
        "networks.tokenizer",
        "networks.weights",
        "training.checkpoint.export",
    ],
    "fastapi": ["serving.http", "serving.page", "serving.ingress"],
    "sqlalchemy": ["serving.store"],
    "psycopg": ["serving.store.database"],
    "httpcore": ["serving.http.fetch", "serving.http.webhooks"],
    "prometheus_client": ["serving.http.exposition"],
    "kornia": ["media.motion", "networks.frozen"],
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


# --- nobody but a method knows what it is ----------------------------------------------------------------------------

AT_HOME = ("methods", "networks", "recipes")


@cache  # asked for by the tests alone: making the networks takes seconds, and every test process reads this file
def names_of_methods() -> tuple[set[str], set[str]]:
    """(classes that are one method's: itself, its recipe, controls and networks; controls that only one method has)."""
    classes, controls = set(), set()
    for recipe in (make() for make in RECIPES.values()):
        method = method_named(recipe.method)
        with torch.device("meta"):
            networks = method.fresh_networks(recipe).values()
        own = (method, method.recipe_type, method.controls_type, *map(type, networks))
        classes |= {kind.__name__ for kind in own}
        shared = FastSampling.model_fields.keys() | LongVideo.model_fields.keys()
        controls |= method.controls_type.model_fields.keys() - shared
    assert not controls & Controls.model_fields.keys()
    return classes, controls - {"loop"}  # a word that players and browsers have as well


def named_methods(source: str) -> list[str]:
    """Where a file names a method's class, or one method's control: as an attribute, argument, field or text.

    A function of the same name, such as `cinemo.media.motion.motion_bucket`, is another thing.
    """
    found = []
    classes, controls = names_of_methods()
    for node in ast.walk(ast.parse(source)):
        name, among = "", controls
        if isinstance(node, ast.Name | ast.alias):
            name, among = (node.id if isinstance(node, ast.Name) else node.name), classes
        elif isinstance(node, ast.Attribute):
            name, among = node.attr, classes | controls
        elif isinstance(node, ast.keyword):
            name = node.arg or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.ImportFrom):
            name, among = node.module or "", {f"cinemo.methods.{own}" for own in ONE_METHOD}
        if name in among:
            found.append(f"{getattr(node, 'lineno', '?')}: {name}")
    return found


SHARED = ("__init__", "base", "controls", "long", "quality", "sampling", "trainable")
ONE_METHOD = {path.stem for path in ROOT.glob("cinemo/methods/*.py")} - set(SHARED)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if module_name(path).split(".")[0] not in AT_HOME],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_its_own_file_knows_a_method(path: Path) -> None:
    assert named_methods(path.read_text()) == []


def test_the_page_knows_no_control_of_a_method() -> None:
    files = [path for path in ROOT.glob("cinemo/serving/page/static/*") if path.suffix in (".js", ".html")]
    assert len(files) > 8
    words = re.compile(rf"\b({'|'.join(sorted(names_of_methods()[1]))})\b")
    assert {path.name: words.findall(path.read_text()) for path in files if words.search(path.read_text())} == {}


def test_the_rule_about_methods_catches_what_it_is_for() -> None:
    classes, controls = names_of_methods()
    assert {"motion_bucket", "dct_init"} <= controls
    assert {"CinemoMethod", "LavieUNet"} <= classes
    source = (
        "from cinemo.methods.cinemo import CinemoMethod\nrequest(motion_bucket=3)\nx.dct_init\ny['motion_bucket']\n"
        "class A:\n    motion_bucket: int\nfrom cinemo.media.motion import motion_bucket\nmotion_bucket(0.5)\n"
    )
    assert {int(line.split(":")[0]) for line in named_methods(source)} == {1, 2, 3, 4, 6}
