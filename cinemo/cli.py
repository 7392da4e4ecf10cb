"""What the entry scripts share: the recipe flags, and how a run ends (0 done, 1 failed run, 2 bad input)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from cinemo.config import Recipe, keys
from cinemo.recipes import RECIPES, load_recipe
from cinemo.types import InputError, RunError


class _Parser(argparse.ArgumentParser):
    """One clear line on bad input; the usage is a ``--help`` away."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default there is; "None" would say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(description: str | None, recipe: str | None = "cinemo-tiny") -> argparse.ArgumentParser:
    """An argument parser that shows every default, with ``--set`` and ``--recipe``, which is ``recipe`` unless given.

    Args:
        recipe: None leaves both flags out.
    """
    epilog = None
    if recipe:
        epilog = "recipe keys for --set: " + ", ".join(keys())
    made = _Parser(description=description, epilog=epilog, formatter_class=_Help)
    if recipe:
        names = ", ".join(RECIPES)
        made.add_argument("--recipe", default=recipe, metavar="NAME|FILE", help=f"{names}, or a .json file")
        made.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="change a recipe key"
        )
    return made


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.assignments)


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main`` and exit: a mendable fault ends in one line on stderr, never in a traceback.

    ``CINEMO_DEBUG=1`` shows the traceback of a failed run.
    """
    try:
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
        _leave(1, error)


def _leave(code: int, error: Exception) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line of a wrapped remote error is the cause; the first one of ours is the message.
    text = lines[0] if isinstance(error, InputError | RunError) and lines else (lines or [type(error).__name__])[-1]
    kind = "" if isinstance(error, InputError | RunError) else f"{type(error).__name__}: "
    note = "" if code == 2 or not kind else " (CINEMO_DEBUG=1 shows the traceback)"
    print(f"{os.path.basename(sys.argv[0])}: {kind}{text}{note}", file=sys.stderr)
    sys.exit(code)
