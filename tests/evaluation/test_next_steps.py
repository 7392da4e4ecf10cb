"""What a demo says in the end works as it is printed."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_bundle

from cinemo import cli
from cinemo.evaluation.next_steps import closing_lines, near

ROOT = Path(__file__).resolve().parents[2]


class Parsed(Exception):
    """Raised by a parser that has accepted its flags, with their values."""


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cli._Parser.parse_known_args

    def parse(self: cli._Parser, *arguments: Any) -> Any:
        namespace, unknown = known(self, *arguments)
        assert not unknown
        raise Parsed(namespace)

    monkeypatch.setattr(cli._Parser, "parse_known_args", parse)


@pytest.mark.usefixtures("parsing")
def test_the_commands_are_accepted_as_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "my demo"
    tiny_bundle(demo)
    (demo / "images").mkdir()
    picture = demo / "images" / "unseen-pan.png"
    lines = closing_lines(demo, ROOT / "pipelines", picture, "it's a wave", {"motion_bucket": 17})
    commands = [shlex.split(line) for line in lines if ".py " in line]
    asked: dict[str, argparse.Namespace] = {}
    for python, script, *words in commands:
        assert os.path.samefile(python, sys.executable)
        assert Path(script).is_file()
        with pytest.raises(Parsed) as accepted:
            importlib.import_module(f"pipelines.{Path(script).stem}").main(words)
        (asked[Path(script).stem],) = accepted.value.args
    assert asked.keys() == {"serve", "animate", "evaluate"}
    assert {each.bundle for each in asked.values()} == {"my demo/bundle"}
    assert Path(asked["evaluate"].data).resolve() == demo / "dataset"
    assert (asked["animate"].prompt, asked["animate"].motion_bucket) == ("it's a wave", 17)
    assert Path(asked["animate"].image).resolve() == picture
    assert sum("mlflow" in line for line in lines) == 1


def test_a_path_is_told_as_one_types_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert near(tmp_path / "demo" / "bundle") == near(Path("demo/bundle")) == "demo/bundle"
    assert near(Path("../elsewhere")) == str(tmp_path.parent / "elsewhere")
