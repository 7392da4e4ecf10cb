"""How a command ends: 0 done, 1 failed run, 2 bad input, and never a traceback unless asked for."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from cinemo import cli
from cinemo.types import InputError, RunError


def ending(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    def main(argv: Sequence[str] | None) -> None:
        if error is not None:
            raise error

    try:
        cli.run(main, [])
    except SystemExit as exit_:
        return exit_.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_every_ending_has_its_code_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(None, capsys) == (0, "")
    code, said = ending(InputError("clip 7: 12 frames, recipe needs 46"), capsys)
    assert code == 2
    assert said.endswith("clip 7: 12 frames, recipe needs 46\n")
    code, said = ending(RunError("9 of 10 clips refused"), capsys)
    assert (code, said.count("\n")) == (1, 1)
    code, said = ending(KeyError("x"), capsys)
    assert (code, said.count("\n")) == (1, 1)
    assert "CINEMO_DEBUG=1" in said
    assert ending(KeyboardInterrupt(), capsys)[0] == 130
    code, said = ending(PermissionError(errno.EACCES, "Permission denied", "/a/b"), capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "/a/b: cannot write there (Permission denied); choose another place" in said
    code, said = ending(OSError(errno.ENOSPC, "No space left on device", "/a/b"), capsys)
    assert (code, said.count("\n")) == (1, 1)
    assert "/a/b: cannot write there (No space left on device); free some space there" in said


def test_a_traceback_is_there_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CINEMO_DEBUG", "1")
    with pytest.raises(KeyError):
        ending(KeyError("x"), capsys)


def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parser("test").parse_args(["--nope"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_defaults_and_recipe_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parser("test").parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: cinemo-tiny)" in shown
    assert "train.zero_stage" in shown


def test_recipe_flags_build_the_recipe() -> None:
    arguments = cli.parser("test").parse_args(
        ["--recipe", "cinemo-320x512", "--set", "train.lr=0.5", "--set", "data.views=2"]
    )
    recipe = cli.recipe_of(arguments)
    assert (recipe.name, recipe.train.lr, recipe.data.views) == ("cinemo-320x512", 0.5, 2)
