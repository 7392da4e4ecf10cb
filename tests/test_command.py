"""The command `cinemo` runs the entry scripts; a wheel brings them, and its dependencies suffice."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cinemo
from cinemo import command
from tests.tiny import tiny_bundle
from tools.licences import canonical, closure

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(sysconfig.get_paths()["purelib"])


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["cinemo", *words])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a script takes its place
    try:
        command.main()
    except SystemExit as left:
        return left.code
    return 0


def test_every_script_is_a_subcommand() -> None:
    assert {name.replace("-", "_") for name in command.EXTRAS} == {
        path.stem for path in (ROOT / "pipelines").glob("*.py")
    }


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch) == 0
    said = capsys.readouterr().out
    assert "  train         Train a motion model on a dataset of latents" in said
    assert called(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"cinemo {cinemo.__version__}\n"


def test_what_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "fly") == 2
    assert capsys.readouterr().err.startswith("cinemo: 'fly' is no subcommand; expected one of precompute, train, ")
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "webdataset" else object())
    assert called(monkeypatch, "precompute") == 2
    said = capsys.readouterr().err
    assert said == "cinemo precompute: webdataset is not installed; run: pip install 'cinemo[data]'\n"
    assert called(monkeypatch, "demo") == 2
    assert "'cinemo[all]'" in capsys.readouterr().err


def test_the_module_that_stands_for_an_extra_comes_with_no_other() -> None:
    """MLflow brings fastapi and matplotlib, for instance."""
    provided = packages_distributions()
    brought = {extra: set(closure("cinemo", frozenset({extra}))) for extra in command._MODULES}
    for extra, module in command._MODULES.items():
        packages = {canonical(name) for name in provided[module]}
        assert packages <= brought[extra], extra
        having = {other for other in brought if packages & brought[other]}
        assert having == {other for other in brought if brought[extra] <= brought[other]}, extra


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment with the built wheel and, of what is installed here, its needs without extras."""
    root = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", root, ROOT], check=True)
    (wheel,) = root.glob("cinemo-*.whl")
    venv.create(root / "venv")
    bin_directory = root / "venv" / "bin"
    subprocess.run([*pip, "--python", bin_directory / "python", "install", "--no-deps", wheel], check=True)
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    needed = closure("cinemo", frozenset()).values()
    for name in {file.parts[0] for package in needed for file in package.files or () if file.parts[0] != ".."}:
        if not (packages / name).exists():
            (packages / name).symlink_to(HERE / name)
    return bin_directory / "cinemo"


def run(command: Path, *words: object, extras: bool) -> str:
    """Standard output. ``extras``: whether their packages can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(HERE)} if extras else {}  # .pth files there are not read: the checkout stays out
    words = (command, *map(str, words))
    done = subprocess.run(words, env=environment, cwd=command.parent, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_picture_is_animated_with_the_least_installation(installed: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    given = [
        "--bundle",
        bundle,
        "--image",
        tmp_path / "picture.png",
        "--prompt",
        "waves",
        "--output",
        tmp_path / "o.mp4",
    ]
    run(installed, "animate", *given, "--steps", 2, extras=False)
    assert (tmp_path / "o.mp4").stat().st_size > 500


@pytest.mark.slow
def test_shipped_networks_and_the_page_are_in_the_wheel(installed: Path) -> None:
    assert "trip-tiny: " in run(installed, "train", "--plan", "--recipe", "trip-tiny", extras=True)
    listing = (
        "import cinemo; from pathlib import Path; root = Path(cinemo.__file__).parent;"
        "print(*(path.relative_to(root.parent) for path in root.rglob('*') if path.is_file()))"
    )
    found = set(run(installed.with_name("python"), "-c", listing, extras=False).split())
    tracked = subprocess.run(["git", "ls-files", "cinemo"], cwd=ROOT, text=True, capture_output=True).stdout.split()
    assert set(tracked) - found == set()
    assert "cinemo/pipelines/train.py" in found
