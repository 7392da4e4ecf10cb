"""`make bench-serve`: what a server costs beside its model, and what it stands; its part of BENCHMARKS.md.

A server of its own (`pipelines/serve.py`, one HTTP replica, one animator of one CPU) for each part. Wall time, in turns
with the model alone, the best of several; clients, server and model share the cores of one machine.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from bench import TINY, fill, table
from bench_sampling_engine import sampling_engine_part
from ports import free_port
from serving.process import Server, png
from tiny import tiny_bundle

from cinemo.animate import AnimateRequest, animate, load_image
from cinemo.bundle import load_bundle, save_bundle
from cinemo.networks.weights import load_unet

Row = tuple[str, ...]
CLIENTS, POLL_SECONDS, IDLE_SECONDS = 64, 15.0, 10.0


@contextlib.contextmanager
def serving(bundle: Path, *flags: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as state:
        port = free_port()
        words = ["pipelines/serve.py", "--bundle", bundle, "--state", state, "--port", str(port), "--cpus", "1"]
        server = Server([*words, *flags], port)
        try:
            yield server
        finally:
            server.stop()


def events(server: Server, video_id: str) -> Iterator[tuple[str, dict[str, Any], float]]:
    """(name, video, when it came) of a job's event stream, until it ends."""
    name = ""
    with server.client.stream("GET", f"/v1/videos/{video_id}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event:"):
                name = line.removeprefix("event:").strip()
            elif line.startswith("data:"):
                yield name, json.loads(line.removeprefix("data:")), time.monotonic()


def overhead(scratch: Path, repeats: int = 3) -> Iterator[Row]:
    """A video of the shipped tiny recipe over HTTP, until its event stream says completed, against `animate` alone.

    CPU time too, which other work on the machine does not touch: of every process of the server, less what they take in
    the same time when nobody asks for anything (Ray Serve's loops).
    """
    save_bundle(scratch / "shipped", TINY, {"unet": load_unet(TINY.model, str(TINY.train.init), torch.float32)}, {})
    bundle, picture = load_bundle(scratch / "shipped", "cpu"), load_image(png(64, 96))

    def alone(seed: int) -> tuple[float, float]:
        begun, used = time.monotonic(), time.process_time()
        animate(bundle, AnimateRequest(picture, "waves", seed=seed))
        return time.monotonic() - begun, time.process_time() - used

    def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def family_of(server: Server) -> list[psutil.Process]:
        return [*server.processes("ray::Serve"), *server.processes("Proxy"), *server.processes("bin/haproxy")]

    def served(server: Server, seed: int) -> tuple[float, float]:
        family = family_of(server)
        begun, used = time.monotonic(), cpu_seconds(family)
        video_id = server.submit(seed=seed)
        *_, (name, video, ended) = events(server, video_id)
        assert name == "completed", video
        return ended - begun, cpu_seconds(family) - used

    alone(0)
    with serving(scratch / "shipped") as server:
        served(server, 0)
        family = family_of(server)
        used = cpu_seconds(family)
        time.sleep(IDLE_SECONDS)
        idle = (cpu_seconds(family) - used) / IDLE_SECONDS
        turns = []
        for seed in range(repeats):
            wall, busy = served(server, seed)
            turns.append((alone(seed), (wall, busy - idle * wall)))
    yield (
        "the server when nobody asks",
        f"{idle:.1%} of a core",
        "",
        "Ray Serve's loops; subtracted from the CPU time below",
    )
    for number, kind in enumerate(("wall", "CPU")):
        model, whole = (min(times[number] for times in side) for side in zip(*turns, strict=True))
        yield (
            f"HTTP + queue + scheduling + mp4, against the model, {kind} time",
            f"{whole / model - 1:+.1%}",
            "< 5 %",
            f"{whole:.2f} s against {model:.2f} s, {TINY.sample.steps} steps",
        )


async def poll(port: int, path: str, until: float, answers: Counter[str]) -> None:
    """One client on one connection that asks again as soon as it is answered."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until:
        writer.write(request)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        except asyncio.IncompleteReadError:
            answers["closed"] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        answers[head.split(b" ", 2)[1].decode()] += 1
    writer.close()


def polls(server: Server, video_ids: Sequence[str]) -> Row:
    async def all_at_once() -> Counter[str]:
        answers: Counter[str] = Counter()
        until = time.monotonic() + POLL_SECONDS
        paths = [f"/v1/videos/{video_ids[number % len(video_ids)]}" for number in range(CLIENTS)]
        await asyncio.gather(*(poll(server.port, path, until, answers) for path in paths))
        return answers

    answers = asyncio.run(all_at_once())
    failed = sum(count for status, count in answers.items() if status != "200")
    rate = sum(answers.values()) / POLL_SECONDS
    return (
        f"status polls of {CLIENTS} clients while jobs run",
        f"{rate:.0f}/s, {failed} failed",
        ">= 300/s, 0 failed",
        f"{sum(answers.values())} in {POLL_SECONDS:g} s",
    )


def first_progress(server: Server, count: int = 20) -> Row:
    waits = []
    for _ in range(count):
        begun = time.monotonic()
        video_id = server.submit(num_inference_steps=20)
        stream = events(server, video_id)
        waits.append(next(when - begun for _, video, when in stream if video["progress"] > 0))
        for _ in stream:
            pass
    middle, most = np.percentile(waits, (50, 95))
    return ("POST to the first progress event", f"{middle:.2f} s", "", f"95 % within {most:.2f} s, idle server")


def load(scratch: Path) -> Iterator[Row]:
    with serving(tiny_bundle(scratch / "stub"), "--max-queued", "1000") as server:
        server.wait(server.submit(num_inference_steps=1))
        yield first_progress(server)
        yield polls(server, [server.submit(num_inference_steps=200) for _ in range(CLIENTS)])


def told(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, each printed when it is known."""
    for row in rows:
        print(" | ".join(row), flush=True)
        yield row


def server_part(scratch: Path) -> str:
    rows = [*told(overhead(scratch)), *told(load(scratch))]
    return SERVER.format(rows=table(("server", "value", "target", ""), rows), cores=os.cpu_count())


def engine_part(_: Path) -> str:
    return "\n" + table(("batching, process CPU time", "value", ""), told(sampling_engine_part())) + "\n"


def main(parts: Sequence[Callable[[Path], str]] = (server_part, engine_part)) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into BENCHMARKS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        text = "".join(part(Path(directory)) for part in parts)
    if arguments.write:
        fill(TITLE, text)
    else:
        print(text)


TITLE = "## Serving"
SERVER = """
Made with `make bench-serve` on {cores} cores, which clients, server and model share: one HTTP replica, one animator of
one CPU. The overhead is a video of the tiny recipe from its POST until its event stream says completed, against
`animate` alone; polls and first progress are those of a random network of milliseconds.

{rows}
"""


if __name__ == "__main__":
    main()
