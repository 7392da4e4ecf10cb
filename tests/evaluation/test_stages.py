"""The chain of stages: what is reused, what is done anew, and how a failing command ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cinemo.evaluation.stages import Stages
from cinemo.progress import shown
from cinemo.types import InputError


def chain(directory: Path, first: int, second: int, fresh: bool = False, fail: bool = False) -> list[str]:
    """Two stages that write one file each; returns which were done."""
    done: list[str] = []
    stages = Stages(directory, directory, fresh)

    def make(name: str) -> None:
        (directory / name).write_text("product")
        done.append(name)
        if fail:
            raise RuntimeError(name)

    stages.run("a", first, ["a"], lambda: make("a"))
    stages.run("b", second, ["b"], lambda: make("b"))
    return done


def test_stages_are_reused_until_something_before_them_changes(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    assert chain(directory, 1, 1) == ["a", "b"]
    assert chain(directory, 1, 1) == []
    assert chain(directory, 1, 2) == ["b"]
    assert chain(directory, 2, 2) == ["a", "b"]
    (directory / "b").unlink()
    assert chain(directory, 2, 2) == ["b"]
    assert chain(directory, 2, 2, fresh=True) == ["a", "b"]


def test_an_interrupted_stage_keeps_its_products_but_a_changed_one_does_not(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    with pytest.raises(RuntimeError):
        chain(directory, 1, 1, fail=True)
    stages = Stages(directory, directory)
    seen: list[bool] = []
    stages.run("a", 1, ["a"], lambda: seen.append((directory / "a").exists()))
    with pytest.raises(RuntimeError):
        chain(directory, 3, 1, fail=True)
    stages = Stages(directory, directory)
    stages.run("a", 4, ["a"], lambda: seen.append((directory / "a").exists()))
    assert seen == [True, False]


def test_a_killed_stage_is_known_to_have_begun(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    script = (
        "import os, sys; from pathlib import Path; from cinemo.evaluation.stages import Stages\n"
        "directory = Path(sys.argv[1]); stages = Stages(directory, directory)\n"
        "def die():\n    (directory / 'a').write_text('half'); os.kill(os.getpid(), 9)\n"
        "stages.run('a', 1, ['a'], die)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(directory)]).returncode == -9
    seen: list[bool] = []
    Stages(directory, directory).run("a", 1, ["a"], lambda: seen.append((directory / "a").exists()))
    assert seen == [True]


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    for fresh in (False, True):
        with pytest.raises(InputError, match="not an earlier demo"):
            Stages(tmp_path, tmp_path, fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_failing_command_ends_with_its_code_and_its_tail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text("import sys\nprint('step 1')\nsys.exit('out of luck')\n")
    stages = Stages(tmp_path / "demo", tmp_path / "scripts")
    words = stages.note("train", "train", "--data", tmp_path / "with space")
    with pytest.raises(SystemExit) as failed:
        stages.run("train", 1, [], lambda: stages.command("train", words))
    assert failed.value.code == 1
    shown = capsys.readouterr()
    assert "step 1" in shown.out
    assert "out of luck" in shown.err
    assert (tmp_path / "demo" / "logs" / "train.log").read_text() == "step 1\nout of luck\n"
    assert stages.commands["train"] == f"python pipelines/train.py --data '{tmp_path}/with space'"
    assert Stages(tmp_path / "demo", tmp_path / "scripts")._stored["train"]["done"] is False


def test_a_silent_command_is_spoken_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinemo.evaluation.stages._PATIENCE", 0.1)
    (tmp_path / "train.py").write_text("import time\ntime.sleep(1.5)\nprint('step 1')\n")
    stages = Stages(tmp_path / "demo", tmp_path)
    words = stages.note("train", "train")
    with shown():
        stages.run("train", 1, [], lambda: stages.command("train", words))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "== train"
    assert said[1].startswith("   train: 0:00:0")
    assert "   step 1" in said
    assert said[-1].startswith("== train: done in 0:00:0")
