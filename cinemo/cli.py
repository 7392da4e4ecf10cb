"""What the entry scripts share: the recipe flags, and how a run ends (0 done, 1 failed run, 2 bad input)."""

from __future__ import annotations

import argparse
import io
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cinemo import diagnostics
from cinemo.config import Recipe, keys
from cinemo.progress import Work, doing, shown
from cinemo.recipes import DEFAULT_RECIPE, RECIPES, load_recipe
from cinemo.types import InputError, RunError, local_fault

if TYPE_CHECKING:
    from cinemo.methods import Method


class _Parser(argparse.ArgumentParser):
    """One clear line on bad input; the usage is a ``--help`` away."""

    recipe: str | None = None

    def format_help(self) -> str:
        if self.recipe:
            self.epilog = f"recipe keys for --set, of {self.recipe}: " + ", ".join(keys(type(load_recipe(self.recipe))))
        return super().format_help()

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"{self.prog}: {message} (see --help)", file=diagnostics.errors())
        self.exit(2)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default there is; "None" would say nothing. Names with hyphens stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(description: str | None, recipe: str | None = DEFAULT_RECIPE) -> argparse.ArgumentParser:
    """An argument parser that shows every default, with ``--set`` and ``--recipe``, which is ``recipe`` unless given.

    Args:
        recipe: None leaves both flags out.
    """
    made = _Parser(description=description, formatter_class=_Help)
    made.recipe = recipe
    if recipe:
        names = ", ".join(RECIPES)
        made.add_argument("--recipe", default=recipe, metavar="NAME|FILE", help=f"{names}, or a .json file")
        made.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="change a recipe key"
        )
    return made


def libraries() -> AbstractContextManager[Work]:
    """Around a command's imports of torch and Ray, which take a while."""
    return doing("loading libraries")


def add_break_lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--break-lock",
        action="store_true",
        help="where a job on another machine holds --output and is known to be dead: replace it at once, without "
        "watching for a minute whether it is alive",
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.assignments)


def add_controls(parser: argparse.ArgumentParser, method: type[Method]) -> None:
    """A flag for each control of a method: ``motion_bucket`` becomes ``--motion-bucket``."""
    from cinemo.methods import controls_of

    for name, info in controls_of(method.controls_type).items():
        about: dict[str, Any] = {"default": info.default}
        default = "" if info.default is not None else " (default: what the bundle's recipe says)"
        if info.kind == "boolean":
            about["action"] = argparse.BooleanOptionalAction
        elif info.kind == "choice":
            about["choices"] = info.choices
        elif info.kind == "vectors":
            text = info.description.replace("%", "%%")
            about = {"action": "append", "dest": name, "metavar": "X0,Y0,X1,Y1", "help": f"{text}; repeatable"}
            parser.add_argument(f"--{name.removesuffix('s')}", **about)
            continue
        elif info.kind == "pair":
            about |= {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        elif info.kind != "text":
            about["type"] = int if info.kind == "integer" else float
            if info.minimum is not None and info.maximum is not None and info.maximum < 1000:
                about["metavar"] = f"{info.minimum:g}..{info.maximum:g}"
        text = info.description.replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{text}{default}", **about)


def add_inputs(parser: argparse.ArgumentParser, method: type[Method]) -> None:
    """Flags for the pictures and videos that a method takes beside ``--image``."""
    for name, about in method.inputs.items():
        flag, help_text = f"--{name.replace('_', '-')}", f"{about.description.replace('%', '%%')}; also s3://"
        if about.kind == "image":
            parser.add_argument(flag, metavar="FILE", required=about.required, help=help_text)
            continue
        parser.add_argument(f"{flag}-video", metavar="FILE", required=about.required, help=help_text)
        parser.add_argument(f"{flag}-interval", type=int, default=1, metavar="N", help="use every Nth of its frames")


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main`` and exit: a mendable fault ends in one line on stderr, never in a traceback.

    Lines come out when they are written, also into a pipe. ``CINEMO_DEBUG=1`` shows the traceback of a failed run, and
    what libraries write to standard error.

    Args:
        argv: of a call within another program; None: this process is the command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if argv is None:
        diagnostics.set_aside_for_good(sys.argv[0])
        _run(main, argv)
        return
    restore = diagnostics.set_aside(sys.argv[0])
    try:
        _run(main, argv)
    finally:
        restore()


def _run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> None:
    try:
        with shown():
            main(argv)
    except InputError as error:
        _leave(2, error)
    except RunError as error:
        _leave(1, error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("CINEMO_DEBUG"):
            raise
        fault = local_fault(error, "") if isinstance(error, OSError) and error.filename else None
        _leave(2 if isinstance(fault, InputError) else 1, fault or error)


def _leave(code: int, error: Exception) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line of a wrapped remote error is the cause; the first one of ours is the message.
    text = lines[0] if isinstance(error, InputError | RunError) and lines else (lines or [type(error).__name__])[-1]
    kind = "" if isinstance(error, InputError | RunError) else f"{type(error).__name__}: "
    places = [] if code == 2 else [*(["CINEMO_DEBUG=1 shows the traceback"] if kind else []), diagnostics.where()]
    note = "; ".join(filter(None, places))
    print(f"{os.path.basename(sys.argv[0])}: {kind}{text}" + (f" ({note})" if note else ""), file=diagnostics.errors())
    sys.exit(code)
