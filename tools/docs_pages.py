"""Pages of the documentation that are made from what they describe: commands, recipes, the HTTP interface, and files of
the repository's root. A hook of mkdocs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("precompute", "train", "export", "animate", "evaluate", "serve", "probe_motion", "demo")
INCLUDED = {"architecture.md": "ARCHITECTURE.md", "benchmarks.md": "BENCHMARKS.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, source in INCLUDED.items():
        if (ROOT / source).is_file():
            text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text())
            files.append(File.generated(config, name, content=text))
    for name, made in (("commands", commands), ("recipes", recipes), ("http", http)):
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(made())))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Python files of the repository in the place of ``--8<-- "PATH"``."""
    return re.sub(r'^--8<-- "(.+)"$', lambda found: f"```python\n{shown(found[1])}\n```", markdown, flags=re.MULTILINE)


def shown(path: str) -> str:
    return (ROOT / path).read_text().rstrip()


def commands() -> Iterator[str]:
    """What each entry script's --help says."""
    yield "# Commands\n\nEach is a script in `pipelines/`. Exit codes: 0 done, 1 a failed run, 2 bad input.\n"
    for name in SCRIPTS:
        yield f"## {name}.py\n\n```text\n{help_of(name)}\n```\n"


def help_of(script: str) -> str:
    said, argv = io.StringIO(), sys.argv
    sys.argv = [f"{script}.py"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(f"pipelines.{script}").main(["--help"])
    finally:
        sys.argv = argv
    return said.getvalue().strip()


def recipes() -> Iterator[str]:
    """Every named recipe, and every key of each method's recipe with its type, default and meaning."""
    from cinemo.config import Part
    from cinemo.recipes import RECIPES

    yield "# Recipes\n\nA run is one recipe: named, or a JSON file, changed by `--set dotted.key=value`.\n"
    yield "| recipe | |\n|---|---|"
    for name, function in RECIPES.items():
        yield f"| `{name}` | {(function.__doc__ or '').strip().partition(chr(10))[0]} |"

    def rows(part: type[Part], before: str) -> Iterator[str]:
        for name, field in part.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Part):
                yield from rows(kind, f"{before}{name}.")
            else:
                default = "" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
                about = (field.description or "").replace("|", "\\|")
                yield f"| `{before}{name}` | {default if len(default) < 90 else '...'} | {about} |"

    seen: set[str] = set()
    for name, function in RECIPES.items():
        kind = type(function())
        if kind.__name__ not in seen:
            seen.add(kind.__name__)
            yield f"\n## Keys of {name}\n\n`{kind.__module__}.{kind.__name__}`\n\n| key | default | |\n|---|---|---|"
            yield from rows(kind, "")


def http() -> Iterator[str]:
    """Paths, parameters and fields of the OpenAPI document."""
    document = openapi()
    yield "# HTTP\n\nThe OpenAPI document of a server with `cinemo-tiny`; each server has its own at `/openapi.json`.\n"
    for path, operations in document["paths"].items():
        for method, about in operations.items():
            yield f"## {method.upper()} {path}\n\n{about.get('description') or about.get('summary', '')}\n"
            answers = [f"`{code}` {answer['description']}" for code, answer in about.get("responses", {}).items()]
            for found in about.get("parameters", ()):
                yield f"- `{found['name']}` ({found['in']}): {found.get('description', '')}"
            yield "\nAnswers: " + "; ".join(answers) + "\n"
    yield "## Fields\n"
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema:
            yield f"\n### {name}\n\n| field | | |\n|---|---|---|"
            for field, about in schema["properties"].items():
                kind = about.get("type") or " or ".join(one.get("type", "object") for one in about.get("anyOf", ()))
                yield f"| `{field}` | {kind} | {' '.join(about.get('description', '').split())} |".replace("||", "| |")


def openapi() -> dict[str, Any]:
    """Of a server with the shipped model, which is not loaded for it."""
    from cinemo.bundle import BundleCard
    from cinemo.media.motion import MotionScale
    from cinemo.recipes import load_recipe
    from cinemo.serving.http.api import build_api
    from cinemo.serving.store.database import Database
    from cinemo.serving.store.jobs import JobStore
    from cinemo.serving.store.media import MediaStore

    recipe = load_recipe("cinemo-tiny")
    card = BundleCard(recipe, MotionScale(recipe.data.bucket_edges), "0" * 64, {})

    async def ready() -> bool:
        return True

    with tempfile.TemporaryDirectory() as directory:
        store = JobStore(Database(f"sqlite:///{directory}/state.sqlite"), MediaStore(f"{directory}/media"))
        return build_api(store, lambda: card, ready).openapi()
