"""`make soak`: a server under hostile use for ten minutes, its processes killed meanwhile, must lose nothing.

Clients submit jobs of random length (some with deadlines, every one with an Idempotency-Key), watch them by polls and
event streams, cancel, delete and download them, and send malformed requests; now and then an animator, an HTTP replica
or the proxy gets SIGKILL. A failed connection or a 5xx is excused for a while after such a kill and tried again. In the
end every job must have ended, once: no client ever saw two ends of one, and the store counted one end for each.
Before that, 5,000 slow clients of each kind come at once, and a status poll must still be answered within a second.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench import table
from ports import free_port
from serving.process import FINAL, Server, eventually, png
from serving.slow_clients import KINDS, slow_clients, slowest_answer
from tiny import tiny_bundle

from cinemo.serving.settings import open_store, parse_settings

EXCUSED = 45.0  # seconds after a kill: a process starts in ten or twenty on a busy machine
VICTIMS = {"animator": 2, "http": 1, "ProxyActor": 1}
SLOW_CLIENTS, SLOWEST_POLL = 5000, 1.0  # at once; seconds
LARGEST_GROWTH = 0.15  # of the private memory of the processes of one kind


class Ledger:
    """What the clients saw. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.finals: dict[str, str | None] = {}
        self.deleted: set[str] = set()
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.killed_at = -EXCUSED

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)
        print(f"FAULT {text}", flush=True)

    def saw(self, video: dict[str, Any]) -> None:
        """A job as an answer showed it; each job is looked at by one client alone."""
        before = self.finals.get(video["id"])
        if before is not None and video["status"] != before:
            self.fault(f"{video['id']} was {before} and became {video['status']}")
        with self.lock:
            self.finals[video["id"]] = video["status"] if video["status"] in FINAL else None

    def excused(self) -> bool:
        return time.monotonic() - self.killed_at < EXCUSED


class Client(threading.Thread):
    """One user with jobs of its own."""

    def __init__(self, number: int, url: str, ledger: Ledger, until: float, seed: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.rng, self.ledger, self.until = random.Random(f"{seed} {number}"), ledger, until
        self.http = httpx.Client(base_url=url, timeout=60)
        self.jobs: list[str] = []

    def run(self) -> None:
        actions = [self.submit] * 4 + [self.look] * 6 + [self.watch] * 2 + [self.remove] * 2 + [self.download]
        actions += [self.malformed] * 3 + [self.browse]
        try:
            while time.monotonic() < self.until:
                self.rng.choice(actions)()
                time.sleep(self.rng.expovariate(8))
        except Exception as error:
            self.ledger.fault(f"{self.name} ended with {error!r}")

    def ask(self, method: str, path: str, expected: tuple[int, ...], **given: Any) -> httpx.Response | None:
        """The answer; tried again for as long as a kill excuses its absence."""
        while True:
            try:
                answer = self.http.request(method, path, **given)
                if answer.status_code < 500:
                    self.ledger.count(f"{answer.status_code}")
                    if answer.status_code not in expected:
                        self.ledger.fault(f"{method} {path[:60]}: {answer.status_code} {answer.text[:200]}")
                    return answer
                failure = f"{answer.status_code} {answer.text[:200]}"
            except httpx.TransportError as error:
                failure = repr(error)
            if not self.ledger.excused():
                self.ledger.fault(f"{method} {path[:60]}: {failure}")
                return None
            self.ledger.count("disturbed by a kill, asked again")
            time.sleep(0.5)

    def submit(self) -> None:
        fields = {"prompt": "waves", "num_inference_steps": str(self.rng.choice((1, 5, 20, 100, 300)))}
        if self.rng.random() < 0.15:
            fields["timeout"] = str(self.rng.choice((1, 3)))
        sent = {"data": fields, "files": {"input_reference": ("a.png", png())}}
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        answer = self.ask("POST", "/v1/videos", (202, 429), headers=headers, **sent)
        if answer is not None and answer.status_code == 202:
            self.ledger.saw(answer.json())
            self.jobs.append(answer.json()["id"])
            if self.rng.random() < 0.2:
                again = self.ask("POST", "/v1/videos", (200, 202), headers=headers, **sent)
                if again is not None and again.json()["id"] != self.jobs[-1]:
                    self.ledger.fault(f"{self.jobs[-1]} was made twice")

    def one(self) -> str | None:
        return self.rng.choice(self.jobs) if self.jobs else None

    def look(self) -> None:
        if video_id := self.one():
            answer = self.ask("GET", f"/v1/videos/{video_id}", (200,))
            if answer is not None and answer.status_code == 200:
                self.ledger.saw(answer.json())

    def watch(self) -> None:
        """An event stream, for a while or to its end, after which the job must have ended."""
        video_id, until = self.one(), time.monotonic() + self.rng.uniform(0.5, 10)
        if video_id is None:
            return
        try:
            with self.http.stream("GET", f"/v1/videos/{video_id}/events") as stream:
                for line in stream.iter_lines():
                    if line.startswith("data:"):
                        self.ledger.saw(json.loads(line.removeprefix("data:")))
                        self.ledger.count("events")
                    if time.monotonic() > until:
                        return
            if self.ledger.finals[video_id] is None and not self.ledger.excused():
                self.ledger.fault(f"{video_id}: its event stream ended before it did")
        except httpx.TransportError as error:
            if not self.ledger.excused():
                self.ledger.fault(f"events of {video_id}: {error!r}")

    def remove(self) -> None:
        """Cancel an unfinished job, delete a finished one."""
        if video_id := self.one():
            answer = self.ask("DELETE", f"/v1/videos/{video_id}", (200, 404))
            if answer is not None and answer.json().get("deleted"):
                with self.ledger.lock:
                    self.ledger.deleted.add(video_id)
                    self.ledger.finals[video_id] = self.ledger.finals.get(video_id) or "deleted"
                self.jobs.remove(video_id)
            elif answer is not None and answer.status_code == 200:
                self.ledger.saw(answer.json())
            elif answer is not None:  # deleted by the try whose answer a kill took
                self.jobs.remove(video_id)
                self.ledger.deleted.add(video_id)

    def download(self) -> None:
        if video_id := self.one():
            answer = self.ask("GET", f"/v1/videos/{video_id}/content", (200, 409))
            if answer is not None and answer.status_code == 200 and answer.content[4:8] != b"ftyp":
                self.ledger.fault(f"{video_id}: its content is no mp4")

    def browse(self) -> None:
        for path in ("/v1/videos?limit=100", "/v1/models", "/healthz", "/metrics"):
            self.ask("GET", path, (200,))

    def malformed(self) -> None:
        method, path, given = self.rng.choice(list(malformed(self.rng)))
        self.ask(method, path, tuple(range(400, 500)), **given)


def malformed(rng: random.Random) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Requests that a server must refuse by a 4xx."""
    picture = {"input_reference": ("a.png", png())}
    noise = rng.randbytes(rng.randrange(1, 4000))
    yield "POST", "/v1/videos", {}
    yield "POST", "/v1/videos", {"content": noise, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    yield "POST", "/v1/videos", {"content": noise, "headers": {"Content-Type": "application/json"}}
    yield "POST", "/v1/videos", {"data": {"prompt": "x"}, "files": {"input_reference": ("a.png", noise)}}
    yield "POST", "/v1/videos", {"data": {"prompt": "x"}, "files": {"input_reference": ("a.png", png()[:-40])}}
    for name, value in (("size", "7x7"), ("seconds", "900"), ("num_inference_steps", "-3"), ("seed", "x"), ("k", "v")):
        yield "POST", "/v1/videos", {"data": {"prompt": "x", name: value}, "files": picture}
    yield "POST", "/v1/videos", {"data": {"prompt": "x" * 100_000}, "files": picture}
    yield "POST", "/v1/videos", {"data": {"prompt": "x"}, "files": {"input_reference": ("a.png", bytes(21 << 20))}}
    for path in (
        "video_0",
        f"video_{rng.randbytes(12).hex()}",
        "..%2f..%2fserving.sqlite",
        "%00",
        "'; DROP TABLE jobs",
    ):
        yield "GET", f"/v1/videos/{path}", {}
        yield "DELETE", f"/v1/videos/{path}", {}
    yield "GET", "/v1/videos?limit=-1", {}
    yield "PATCH", "/v1/videos", {"content": noise}


def kill_some(server: Server, ledger: Ledger, rng: random.Random, every: float, until: float) -> None:
    """SIGKILL for a random process, when the server has recovered from the last one."""
    while time.monotonic() + every < until:
        time.sleep(rng.uniform(0.5, 1.5) * every)
        name = rng.choices(list(VICTIMS), weights=list(VICTIMS.values()))[0]
        processes = server.processes(name if name == "ProxyActor" else f"ServeReplica:cinemo:{name}")
        if processes:
            ledger.killed_at = time.monotonic()
            rng.choice(processes).kill()
            ledger.count(f"kill -9 of {name}")
            eventually(lambda: server.client.get("/readyz").status_code == 200, 120, every=0.5)
            ledger.killed_at = time.monotonic()


def sample_memory(server: Server, until: float, found: list[tuple[float, str, float]]) -> None:
    """(time, kind, private bytes) of each process of Serve, every few seconds."""
    kinds = {"animator": "ServeReplica:cinemo:animator", "http": "ServeReplica:cinemo:http"}
    kinds |= {"proxy": "ProxyActor", "controller": "ServeController"}
    while time.monotonic() < until:
        for kind, title in kinds.items():
            for process in server.processes(title):
                try:
                    found.append((time.monotonic(), kind, float(process.memory_full_info().uss)))
                except psutil.Error:
                    continue
        time.sleep(5)


def memory_table(found: list[tuple[float, str, float]], begun: float, ended: float) -> tuple[str, list[str]]:
    """Private memory by kind in the first minute and in the last one (a quarter, where there are not so many)."""
    window = min(60.0, (ended - begun) / 4)
    rows, grown = [], []
    for kind in dict.fromkeys(kind for _, kind, _ in found):
        first = [size for when, k, size in found if k == kind and when - begun < window]
        last = [size for when, k, size in found if k == kind and ended - when < window]
        if first and last:
            growth = max(last) / max(first) - 1
            rows.append((kind, f"{max(first) / 2**20:.0f} MB", f"{max(last) / 2**20:.0f} MB", f"{growth:+.1%}"))
            if growth > LARGEST_GROWTH:
                grown.append(f"{kind} grew by {growth:.0%}")
    return table(("private memory at most", "first minute", "last minute", ""), rows), grown


def trickle(server: Server, ledger: Ledger, count: int) -> list[tuple[str, str, str, str]]:
    """How long the slowest of the status polls took while so many slow clients of each kind held on."""
    video_id, rows = server.submit(num_inference_steps="1"), []
    ledger.saw(server.wait(video_id))
    for kind in KINDS:
        with slow_clients(server.port, kind, count):
            time.sleep(12)  # longer than a request may take to arrive
            held = sum(connections(process, server.port) for process in server.processes("bin/haproxy"))
            slowest, answers, failures = slowest_answer(f"{server.url}/v1/videos/{video_id}", 15)
        if failures or slowest > SLOWEST_POLL:
            ledger.fault(f"{count} slow {kind}: {failures} of {answers + failures} polls failed, {slowest:.2f} s")
        rows.append((kind, str(held), str(answers), f"{slowest:.2f} s"))
    return rows


def connections(process: psutil.Process, port: int) -> int:
    return sum(each.laddr.port == port and each.status == "ESTABLISHED" for each in process.net_connections("tcp"))


def settle(ledger: Ledger, server: Server, clients: list[Client]) -> None:
    """Wait for every job's end, then see that the list shows no other and every video is there."""

    def unfinished() -> list[str]:
        for client in clients:
            for video_id in client.jobs:
                if ledger.finals.get(video_id) is None:
                    ledger.saw(server.video(video_id))
        return [video_id for video_id, final in ledger.finals.items() if final is None]

    try:
        eventually(lambda: not unfinished(), 300, every=1)
    except AssertionError:
        ledger.fault(f"never ended: {unfinished()}")
    for client in clients:
        for video_id in client.jobs:
            video = server.video(video_id)
            ledger.saw(video)
            if video["status"] == "completed":
                content = server.client.get(f"/v1/videos/{video_id}/content")
                if content.status_code != 200 or content.content[4:8] != b"ftyp":
                    ledger.fault(f"{video_id} is completed and has no video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kill-every", type=float, default=40.0, help="seconds between kills, about")
    parser.add_argument("--slow-clients", type=int, default=SLOW_CLIENTS, help="of each kind, at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, ledger = random.Random(arguments.seed), Ledger()
    with tempfile.TemporaryDirectory() as directory:
        scratch, port = Path(directory), free_port()
        flags = ["--http-replicas", "2", "--lease-seconds", "5", "--max-attempts", "8", "--cpus", "1"]
        flags += ["--state", str(scratch / "state"), "--port", str(port), "--max-queued", "40"]
        server = Server(["pipelines/serve.py", "--bundle", tiny_bundle(scratch / "tiny"), *flags], port)
        try:
            slow = trickle(server, ledger, arguments.slow_clients)
            begun = time.monotonic()
            until = begun + 60 * arguments.minutes
            memory: list[tuple[float, str, float]] = []
            clients = [Client(k, server.url, ledger, until, arguments.seed) for k in range(arguments.clients)]
            others: list[Callable[[], None]] = [
                lambda: kill_some(server, ledger, rng, arguments.kill_every, begun + 0.8 * (until - begun)),
                lambda: sample_memory(server, until, memory),
            ]
            threads = [*clients, *(threading.Thread(target=work, daemon=True) for work in others)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            settle(ledger, server, clients)
        finally:
            output = server.stop()
        store = open_store(parse_settings({"bundle": "", "state": str(scratch / "state")}))
        ends = store.statistics().finished
    if sum(ends.values()) != len(ledger.finals):
        ledger.fault(f"{len(ledger.finals)} jobs have {sum(ends.values())} ends: {dict(ends)}")
    if "Traceback" in output:
        ledger.fault(f"a traceback on the console: {output[output.index('Traceback') :][:400]}")
    print(table(("slow clients", "connections", "polls", "slowest"), slow), "\n")
    text, grown = memory_table(memory, begun, until)
    print(table(("what", "count"), [(what, str(count)) for what, count in sorted(ledger.counts.items())]), "\n")
    print(text, "\n")
    if arguments.minutes >= 5:
        ledger.faults += grown
    print(f"{len(ledger.finals)} jobs in {arguments.minutes:g} min ended as {dict(ends)}; {len(ledger.faults)} faults")
    sys.exit(bool(ledger.faults))


if __name__ == "__main__":
    main()
