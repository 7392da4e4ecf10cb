"""`make chaos`: precompute is killed over and over, at moments drawn from a seed, and must end in the same bytes.

Each round makes the same dataset in a fresh output. Its command is started again after every kill (SIGKILL) of one of
its processes: a worker (the command must survive that), the raylet or the GCS (the Ray node), the driver alone, or
everything at once. Half of the kills wait for a file that is being written or was just renamed, the others come at any
time. In the end every file must have the sha256 of an undisturbed run's, and there must be no other file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from data.small_data import film

from cinemo.config import override
from cinemo.media.video import write_video
from cinemo.recipes import cinemo_tiny

ROOT = Path(__file__).resolve().parent.parent
VICTIMS = ("worker", "raylet", "gcs", "driver", "everything")
PATIENCE = 300.0  # seconds for one command; one that takes longer hangs


@dataclass(frozen=True)
class Kill:
    """``victim`` dies ``delay`` seconds after the start, or after the next change in the output (``at_write``)."""

    victim: str
    at_write: bool
    delay: float

    def __str__(self) -> str:
        return f"{self.victim} {'at a write +' if self.at_write else 'after '}{self.delay:.3f} s"


def draw(rng: random.Random, victims: Sequence[str] = VICTIMS) -> Kill:
    at_write = rng.random() < 0.5
    return Kill(rng.choice(victims), at_write, rng.uniform(0, 0.05) if at_write else rng.uniform(0, 25))


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def make_clips(directory: Path, count: int) -> None:
    """Small films, and every seventh one broken."""
    for number in range(count):
        path = directory / f"film-{number:03d}.mp4"
        if number % 7 == 3:
            path.write_bytes(b"no video at all " * 50)
        else:
            write_video(path, film(str(number), 20 + number % 9), 25)


def run_and_kill(command: Sequence[str], output: Path, kill: Kill | None) -> tuple[int, bool]:
    """The command's exit code, and whether the victim was there to be killed. Nothing of it is left running."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CINEMO_DEBUG": "1"}
    with log_of(output).open("wb") as log:
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
    killed, family = False, list[psutil.Process]()
    try:
        begun, before = time.monotonic(), written(output)
        while process.poll() is None and time.monotonic() - begun < PATIENCE:
            if kill and not killed and (written(output) != before if kill.at_write else due(begun, kill.delay)):
                if kill.at_write:
                    time.sleep(kill.delay)
                family = descendants(process.pid)
                killed = strike(process, family, kill.victim)
            time.sleep(0.002 if kill and kill.at_write and not killed else 0.05)
        if process.poll() is None:
            raise TimeoutError(f"the command hangs after {PATIENCE:g} s ({kill})")
        return process.returncode, killed
    finally:
        for member in [*family, *descendants(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()  # what a dead driver leaves would end by itself, later
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_of(output: Path) -> Path:
    """What the last command printed."""
    return output.with_name(output.name + ".log")


def due(begun: float, delay: float) -> bool:
    return time.monotonic() - begun > delay


def written(output: Path) -> set[str]:
    return {entry for name in ("shards", "quarantine") for entry in names(output / name)}  # of files being written too


def names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def strike(process: subprocess.Popen[bytes], family: Sequence[psutil.Process], victim: str) -> bool:
    if victim == "driver":
        process.kill()
        return True
    # Not those of Ray's own processes on which a node depends (ray::DashboardAgent, ray::RuntimeEnvAgent).
    marks = {"worker": "ray::Map", "raylet": "raylet/raylet", "gcs": "gcs_server", "everything": ""}
    found = [member for member in family if marks[victim] in command_line(member)]
    if victim == "everything":
        process.kill()
    if victim == "worker":
        found = found[-1:]
    for member in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    return bool(found) or victim == "everything"


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])
    return ""


def disturb(command: Sequence[str], output: Path, kills: Sequence[Kill]) -> Iterator[str]:
    """Start the command until it is through, with a kill each time as long as there are any; yields what happened."""
    for kill in kills:
        code, killed = run_and_kill(command, output, kill)
        yield f"{kill} -> {'exit ' + str(code) if killed else 'too late, exit ' + str(code)}"
        if killed and kill.victim == "worker" and code != 0:
            log = log_of(output).read_text(errors="replace")[-6000:]
            raise AssertionError(f"{kill}: the command ended with {code}; Ray should have made a new worker\n{log}")
    for _ in range(3):
        code, _ = run_and_kill(command, output, None)
        yield f"undisturbed -> exit {code}"
        if code == 0:
            return
    raise AssertionError("the command does not get through undisturbed any more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5, help="kills in a round")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_clips(directory / "clips", arguments.clips)
        recipe = override(cinemo_tiny(), ["data.frames=6", "data.size=[64,96]", "data.frame_interval=[1,3]"])
        recipe = override(recipe, ["data.clips_per_shard=4", "data.views=2"])
        (directory / "recipe.json").write_text(recipe.to_json())

        def command(output: Path) -> list[str]:
            words = [
                "--recipe", directory / "recipe.json", "--manifest", directory / "clips", "--output", output
            ]  # fmt: skip
            return [sys.executable, str(ROOT / "pipelines/precompute.py"), *map(str, words)]

        code, _ = run_and_kill(command(directory / "undisturbed"), directory / "undisturbed", None)
        expected = digests(directory / "undisturbed")
        assert code == 0, f"the undisturbed run ended with {code}"
        print(f"undisturbed: {len(expected)} files", flush=True)
        failed = 0
        for number in range(arguments.rounds):
            rng = random.Random(f"{arguments.seed} {number}")
            output = directory / f"round-{number}"
            print(f"round {number} (seed {arguments.seed})", flush=True)
            for event in disturb(command(output), output, [draw(rng) for _ in range(arguments.kills)]):
                print(f"  {event}", flush=True)
            got = digests(output)
            wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            failed += bool(wrong)
            print(f"  {'DIFFERENT: ' + ', '.join(wrong) if wrong else f'equal: {len(got)} files'}", flush=True)
        print(f"{arguments.rounds - failed} of {arguments.rounds} rounds ended in the same bytes")
        sys.exit(bool(failed))


if __name__ == "__main__":
    main()
