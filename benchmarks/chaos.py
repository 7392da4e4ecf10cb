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
import logging
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
from data.small_data import digests, film

from cinemo import s3, storage
from cinemo.media.mp4 import write_video
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_tiny

ROOT = Path(__file__).resolve().parent.parent
FATAL = ("raylet", "gcs", "driver", "everything")
PATIENCE = 600.0  # seconds for one command; one that takes longer hangs


@dataclass(frozen=True)
class Kill:
    """``victim`` dies ``delay`` seconds after the last kill (or the start), or after the next change in the output."""

    victim: str
    at_write: bool
    delay: float

    def __str__(self) -> str:
        return f"{self.victim} {'at a write +' if self.at_write else 'after '}{self.delay:.3f} s"


def make_clips(directory: Path, count: int) -> None:
    """Small films, and every seventh one broken."""
    for number in range(count):
        path = directory / f"film-{number:03d}.mp4"
        if number % 7 == 3:
            path.write_bytes(b"no video at all " * 50)
        else:
            write_video(path, film(str(number), 20 + number % 9), 25)


def run_and_kill(command: Sequence[str], output: Path | str, kills: Sequence[Kill] = ()) -> tuple[int, int]:
    """The command's exit code, and how many of the kills came in time, one after the other. Nothing is left running.

    Args:
        output: what the command writes, looked at for kills at a write; a string is a URI.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CINEMO_DEBUG": "1"}
    with log_of(output).open("wb") as log:
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
    done, family = 0, list[psutil.Process]()
    begun = since = time.monotonic()
    before = written(output)
    try:
        while process.poll() is None and time.monotonic() - begun < PATIENCE:
            kill = kills[done] if done < len(kills) else None
            if kill and (written(output) != before if kill.at_write else time.monotonic() - since > kill.delay):
                if kill.at_write:
                    time.sleep(kill.delay)
                family = descendants(process.pid)
                if strike(process, family, kill.victim):
                    done, since, before = done + 1, time.monotonic(), written(output)
            time.sleep(0.002 if kill and kill.at_write else 0.05)
        if process.poll() is None:
            raise TimeoutError(f"the command hangs after {PATIENCE:g} s and {done} of {list(map(str, kills))}")
        return process.returncode, done
    finally:
        for member in [*family, *descendants(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()  # what a dead driver leaves would end by itself, later
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_of(output: Path | str) -> Path:
    """What the last command printed: beside a local output, else in the working directory for temporary files."""
    if isinstance(output, Path):
        return output.with_name(output.name + ".log")
    return Path(tempfile.gettempdir()) / f"chaos-{os.getpid()}-{output.rsplit('/', 1)[-1]}.log"


def written(output: Path | str) -> set[str]:
    """Names under the output; locally those of files that are being written too."""
    return {entry for name in ("shards", "quarantine", "train", "order") for entry in names(output, name)}


def names(output: Path | str, name: str) -> list[str]:
    if isinstance(output, str):
        return storage.names(storage.join(output, name))
    try:
        return os.listdir(output / name)  # 500 times a second: nothing slower
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
    marks = {
        "worker": ("ray::Map", "ray::RayTrainWorker"),
        "raylet": ("raylet/raylet",),
        "gcs": ("gcs_server",),
        "everything": ("",),
    }
    found = [member for member in family if any(mark in command_line(member) for mark in marks[victim])]
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


def disturb(commands: Sequence[Sequence[str]], output: Path | str, lives: Sequence[Sequence[Kill]]) -> Iterator[str]:
    """Start the next of the commands again and again until one is through, with the kills of each life; yields what
    happened."""
    for command, kills in zip(commands, [*lives, [], [], []], strict=False):
        code, done = run_and_kill(command, output, kills)
        yield f"{', '.join(map(str, kills[:done])) or 'undisturbed'} -> exit {code}"
        if code == 0:
            return
        if all(kill.victim == "worker" for kill in kills[:done]):
            log = log_of(output).read_text(errors="replace")[-6000:]
            raise AssertionError(f"the command ended with {code} though nothing but workers was killed\n{log}")
    raise AssertionError("the command does not get through undisturbed any more")


def draw(rng: random.Random, lives: int) -> list[list[Kill]]:
    """Each life of the command ends with a kill that it cannot survive; up to two workers die before."""

    def one(victim: str) -> Kill:
        at_write = rng.random() < 0.6
        return Kill(victim, at_write, rng.uniform(0, 0.05) if at_write else rng.uniform(0, 20))

    return [[*(one("worker") for _ in range(rng.randrange(3))), one(rng.choice(FATAL))] for _ in range(lives)]


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URI of an empty bucket on a server in this process; sets the AWS_* environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    boto3.client("s3").create_bucket(Bucket="chaos")
    yield "s3://chaos"
    server.stop()


def digests_of(output: Path | str) -> dict[str, str]:
    if isinstance(output, Path):
        return digests(output)
    found = [uri.removeprefix(output.removeprefix("s3://") + "/") for uri in s3.client().find(output)]
    return {
        name: hashlib.sha256(storage.read_bytes(storage.join(output, name))).hexdigest()
        for name in found
        if name != "report.html"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lives", type=int, default=5, help="starts of a round's command that end with a kill")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="outputs on s3:// instead of a local disk")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        bucket = stack.enter_context(s3_server()) if arguments.s3 else None
        directory = Path(scratch)
        make_clips(directory / "clips", arguments.clips)
        recipe = override(cinemo_tiny(), ["data.frames=6", "data.size=[64,96]", "data.frame_interval=[1,3]"])
        recipe = override(recipe, ["data.clips_per_shard=4", "data.views=2"])
        (directory / "recipe.json").write_text(recipe.to_json())

        def place(name: str) -> Path | str:
            return f"{bucket}/{name}" if bucket else directory / name

        def command(output: Path | str) -> list[str]:
            words = [
                "--recipe", directory / "recipe.json", "--manifest", directory / "clips", "--output", output,
                "--file-names-as-captions",
            ]  # fmt: skip
            return [sys.executable, str(ROOT / "pipelines/precompute.py"), *map(str, words)]

        # Undisturbed is a local run: what lies on s3:// must be the same bytes.
        undisturbed = directory / "undisturbed"
        code, _ = run_and_kill(command(undisturbed), undisturbed)
        expected = digests(undisturbed)
        assert code == 0, f"the undisturbed run ended with {code}"
        print(f"undisturbed: {len(expected)} files", flush=True)
        failed = 0
        for number in range(arguments.rounds):
            rng = random.Random(f"{arguments.seed} {number}")
            output = place(f"round-{number}")
            print(f"round {number} (seed {arguments.seed})", flush=True)
            for event in disturb([command(output)] * (arguments.lives + 3), output, draw(rng, arguments.lives)):
                print(f"  {event}", flush=True)
            got = digests_of(output)
            wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            failed += bool(wrong)
            print(f"  {'DIFFERENT: ' + ', '.join(wrong) if wrong else f'equal: {len(got)} files'}", flush=True)
        print(f"{arguments.rounds - failed} of {arguments.rounds} rounds ended in the same bytes")
        sys.exit(bool(failed))


if __name__ == "__main__":
    main()
