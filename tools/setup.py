"""Make the environment that the Makefile's commands run in, saying what is done and how long it takes.

``python -m tools.setup DIR``, with the standard library alone. pip installs, or uv where there is one: the same
packages from the same places.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

CONSTRAINTS = "constraints.txt"
PHASES = (
    ("torch (about 200 MB for CPUs, some GB where it brings CUDA)", ["torch"]),
    ("everything else (about 240 packages)", ["--editable", ".[dev]"]),
)
_TAIL = 15


def main(directory: str) -> None:
    from cinemo.progress import clock, say

    begun = time.monotonic()
    uv, python = shutil.which("uv"), os.path.join(directory, "bin", "python")
    if uv:
        make = [uv, "venv", "--quiet", "--seed", "--allow-existing", "--python", sys.executable, directory]
        install = [uv, "pip", "install", "--compile-bytecode", "--python", python, *indexes_of_pip()]
    else:
        make = [sys.executable, "-m", "venv", directory]
        install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    say(f"setting up {directory} with {'uv' if uv else 'pip'}; it takes minutes, once")
    phases = [(f"virtual environment in {directory}", make)]
    phases += [(what, [*install, "--constraint", CONSTRAINTS, *packages]) for what, packages in PHASES]
    for number, (what, command) in enumerate(phases, 1):
        name, started = f"[{number}/{len(phases)}]", time.monotonic()
        say(f"{name} {what} ...")
        run(name, command)
        say(f"{name} done in {clock(time.monotonic() - started)}")
    say(f"{directory} is ready after {clock(time.monotonic() - begun)}")


def run(name: str, command: list[str]) -> None:
    """Run a command that shows its own progress on a terminal; elsewhere say now and then what it is at.

    Raises:
        SystemExit: it failed, with its exit code; what it said last was printed.
    """
    from cinemo.progress import doing, shown

    if sys.stdout.isatty():
        code = subprocess.call(command)
    else:
        lines: list[str] = []
        with shown(), doing(name) as work:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line in filter(None, map(str.strip, process.stdout or ())):
                lines.append(line)
                if not line.startswith("WARNING"):
                    work.what = f"{name} {line[:80]}"
            code = process.wait()
        if code:
            print(*lines[-_TAIL:], sep="\n", file=sys.stderr)
    if code:
        print(f"{name} failed with exit code {code}: {' '.join(command)}", file=sys.stderr)
        sys.exit(code)


def indexes_of_pip() -> list[str]:
    """Flags that make uv look where pip is configured to look, and choose among these places as pip does."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    # What the environment says is listed first, and goes before files.
    values = {name.rpartition(".")[2]: value.strip("'\"") for name, value in reversed(settings.items())}
    flags = ["--index-strategy", "unsafe-best-match"]
    for name in ("index-url", "extra-index-url", "find-links"):
        flags += [word for place in values.get(name, "").split() for word in (f"--{name}", place)]
    if "cert" in values:
        os.environ.setdefault("SSL_CERT_FILE", values["cert"])
    return flags


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"cinemo needs Python >= 3.11, this is {sys.version}")
    main(sys.argv[1])
