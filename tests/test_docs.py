"""The documentation builds without a warning, its commands are ones that the scripts take, and its tutorial runs."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from serving.process import Server

from cinemo.recipes import load_recipe
from tests.pipelines.test_chain import main_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Placeholders of synopses, which are no commands.
SYNOPSIS = re.compile(r"[\[|]|\b(URI|DIR|FILE|ID|BUNDLE)\b|\.\.\.")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block of a page's text."""
    for found in BLOCK.finditer(page):
        yield found[1], found[2]


def lines(page: str) -> Iterator[str]:
    """Shell lines of a page's text that start an entry script, as they would be typed."""
    for language, text in blocks(page):
        if language in ("", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                if found := re.search(r"(?:python pipelines/|^cinemo |-- cinemo )(\w.*)", line):
                    yield found[1].partition("  #")[0].strip()


COMMANDS = sorted(
    {(page.name, line) for page in PAGES for line in lines(page.read_text()) if not SYNOPSIS.search(line)}
)


class Parsed(Exception):
    """A script has read its flags."""


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_one_that_its_script_takes(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *flags = shlex.split(line)
    script = importlib.import_module(f"pipelines.{name.removesuffix('.py').replace('-', '_')}")
    parse = argparse.ArgumentParser.parse_known_args

    def parsed(self: Any, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = parse(self, args, namespace)
        raise Parsed(found, unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    if hasattr(script, "card_of_bundle"):
        monkeypatch.setattr(
            script, "card_of_bundle", lambda argv: None
        )  # there is no bundle; the default recipe's flags
    with pytest.raises(Parsed) as read:
        script.main(flags)
    found, unknown = read.value.args
    assert unknown == []
    if hasattr(found, "assignments"):
        load_recipe(found.recipe, found.assignments)


def test_the_search_for_commands_finds_them() -> None:
    assert len(COMMANDS) > 25
    assert {line.partition(".py")[0] for _, line in COMMANDS} >= {"precompute", "train", "export", "animate", "serve"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert built.returncode == 0, built.stderr
    for page, shown in (
        ("papers/cinemo", "motion residuals"),
        ("reference/commands", "--skip-sample"),
        ("reference/recipes", "data.bucket_edges"),
        ("reference/http", "POST /v1/videos/sync"),
        ("reference/python", "stored_fields"),
        ("howto/add-a-method", "class FifthMethod(Method)"),
    ):
        text = re.sub(r"<[^>]+>", "", (tmp_path / page / "index.html").read_text())
        assert shown in text, page


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.ray
def test_the_tutorial_runs_as_it_stands(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Entry scripts in this process, which has the libraries and a Ray; the server and all else in their own."""
    monkeypatch.chdir(tmp_path)
    port, servers = free_port(), []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        for language, text in blocks((ROOT / "docs" / "tutorial.md").read_text()):
            text = text.replace("8000", str(port))
            # The words after ``python``.
            commands = [["-c", textwrap.dedent(text)]]
            if language != "python":
                commands = [shlex.split(line)[1:] for line in text.splitlines()]
            for first, *words in commands:
                if first == "pipelines/serve.py":
                    words = [word.replace("tutorial", f"{tmp_path}/tutorial") for word in words]
                    servers.append(Server([first, *words], port))
                elif first.startswith("pipelines/"):
                    main_of(Path(first).stem, capfd, *words)
                else:
                    command = [sys.executable, first, *words]
                    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
                    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    finally:
        for server in servers:
            server.kill()
    assert len(servers) == 1
    results = ("dataset/report.html", "video.mp4", "served.mp4", "evaluation/motion.json")
    assert [name for name in results if not (tmp_path / "tutorial" / name).is_file()] == []
