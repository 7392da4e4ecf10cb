"""The command ``cinemo``: ``cinemo train ...`` runs ``pipelines/train.py ...``, of a checkout or an installed wheel."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from cinemo import __version__

# What each subcommand needs beyond the package's own dependencies: an extra, as in pip install 'cinemo[data]'.
EXTRAS = {
    "precompute": "data",
    "train": "train",
    "export": "train",
    "animate": "",
    "probe-motion": "",
    "evaluate": "report",
    "serve": "serve",
    "demo": "all",
}
# A module of each extra that nothing else brings.
_MODULES = {"data": "webdataset", "train": "deepspeed", "report": "skimage", "serve": "psycopg"}


def scripts() -> Path:
    """The entry scripts: ``cinemo/pipelines`` of a wheel, or ``pipelines`` beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "pipelines"
    return installed if installed.is_dir() else package.parent / "pipelines"


def main() -> None:
    """Run a subcommand as its script would run: same flags, output and exit codes."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"cinemo {__version__}")
    elif name not in EXTRAS:
        _refuse(f"cinemo: {name!r} is no subcommand; expected one of {', '.join(EXTRAS)} (see --help)")
    else:
        extra = EXTRAS[name]
        absent = [module for key, module in _MODULES.items() if extra in (key, "all") and find_spec(module) is None]
        if absent:
            _refuse(f"cinemo {name}: {absent[0]} is not installed; run: pip install 'cinemo[{extra}]'")
        sys.argv = [f"cinemo {name}", *flags]
        _run(_script(name))


def _script(name: str) -> Path:
    return scripts() / f"{name.replace('-', '_')}.py"


def _run(script: Path) -> None:
    """As `runpy.run_path` would, but what the script calls itself stays ``cinemo NAME``."""
    module = ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), script, "exec"), module.__dict__)


def _help() -> str:
    lines = [f"cinemo {__version__}. Each subcommand has --help:", ""]
    for name, extra in EXTRAS.items():
        about = (ast.get_docstring(ast.parse(_script(name).read_text())) or "").partition("\n\n")[0].replace("\n", " ")
        lines.append(f"  {name:13} {about}" + (f" [{extra}]" if extra else ""))
    return "\n".join([*lines, "", "In brackets: the extra that it needs, as in: pip install 'cinemo[data]'"])


def _refuse(line: str) -> None:
    print(line, file=sys.stderr)
    sys.exit(2)
