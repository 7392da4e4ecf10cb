"""S3 servers that are not Amazon's, on loopback, from package registries: OpenStack Swift (Debian), s3rver (npm).

Both are unlike it where it matters: Swift answers 501 to a conditional PUT and refuses a DeleteObjects without
Content-MD5; s3rver ignores conditions and answers 501 to ListMultipartUploads.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parent.parent
_SWIFT = ("proxy", "account", "container", "object")
_START_SECONDS = 120
# Debian's Python has Swift. Arguments: pairs of a ring's file and the port of its only device.
_RINGS = """
import sys
from swift.common.ring import RingBuilder
for path, port in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    address = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "device": "d1", "weight": 1, "meta": "", **address})
    builder.rebalance()
    builder.get_ring().save(path)
"""


@dataclass(frozen=True)
class Server:
    endpoint: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def moto(directory: Path) -> Iterator[Server]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Server(f"http://{host}:{port}", "test", "test")
    finally:
        server.stop()


@contextmanager
def s3rver(directory: Path) -> Iterator[Server]:
    """Skips where it is absent: ``npm install --prefix .cache/s3rver s3rver``."""
    installed = ROOT / ".cache/s3rver/node_modules/.bin/s3rver"
    program = str(installed) if installed.exists() else shutil.which("s3rver")
    if program is None or shutil.which("node") is None:
        pytest.skip("no s3rver on this machine (npm install --prefix .cache/s3rver s3rver)")
    port = free_port()
    command = [program, "-d", str(directory), "-a", "127.0.0.1", "-p", str(port), "-s", "--no-vhost-buckets"]
    with _process(command, directory / "s3rver.log"):
        _wait_for([port], directory)
        yield Server(f"http://127.0.0.1:{port}", "S3RVER", "S3RVER")


@contextmanager
def swift(directory: Path) -> Iterator[Server]:
    """All of Swift with one device in a directory. Skips where it is absent:
    ``apt-get install swift-proxy swift-account swift-container swift-object``.
    """
    missing = [name for name in (f"swift-{name}-server" for name in _SWIFT) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no OpenStack Swift on this machine ({', '.join(missing)} missing)")
    try:
        os.setxattr(directory, "user.test", b"")
    except OSError as error:
        pytest.skip(f"no OpenStack Swift here: it needs extended attributes, and {directory} has none ({error})")
    ports = {name: free_port() for name in _SWIFT}
    _configure_swift(directory, ports)
    with ExitStack() as stack:
        for name in _SWIFT:
            command = [f"swift-{name}-server", str(directory / f"{name}-server.conf"), "-v"]
            stack.enter_context(_process(command, directory / f"{name}.log", SWIFT_DIR=str(directory)))
        _wait_for(ports.values(), directory)
        yield Server(f"http://127.0.0.1:{ports['proxy']}", "test:tester", "testing")


def _configure_swift(directory: Path, ports: dict[str, int]) -> None:
    (directory / "devices" / "d1").mkdir(parents=True)
    (directory / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
        "[storage-policy:0]\nname = gold\ndefault = yes\n"
    )
    for name, port in ports.items():
        default = f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nswift_dir = {directory}\n"
        default += f"user = {getpass.getuser()}\n"
        if name == "proxy":
            filters = {"catch_errors": "", "cache": "memcache", "s3api": "", "tempauth": "", "slo": "", "dlo": ""}
            extra = {"s3api": "location = us-east-1\n", "tempauth": "user_test_tester = testing .admin\n"}
            text = f"{default}[pipeline:main]\npipeline = {' '.join(filters)} proxy-server\n"
            text += "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
            for kind, egg in filters.items():
                text += f"[filter:{kind}]\nuse = egg:swift#{egg or kind}\n{extra.get(kind, '')}"
        else:
            text = f"{default}devices = {directory / 'devices'}\nmount_check = false\n"
            text += f"[pipeline:main]\npipeline = {name}-server\n[app:{name}-server]\nuse = egg:swift#{name}\n"
        (directory / f"{name}-server.conf").write_text(text)
    rings = [word for name in _SWIFT[1:] for word in (str(directory / f"{name}.ring.gz"), str(ports[name]))]
    subprocess.run(["/usr/bin/python3", "-c", _RINGS, *rings], check=True, capture_output=True, timeout=60)


@contextmanager
def _process(command: list[str], log: Path, **environment: str) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(ports: Iterable[int], directory: Path) -> None:
    """Until every port is listened on; Swift needs seconds."""
    deadline = time.monotonic() + _START_SECONDS
    for port in ports:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    logs = "".join(path.read_text(errors="replace")[-500:] for path in directory.glob("*.log"))
                    raise RuntimeError(f"port {port} does not answer: {logs}") from None
                time.sleep(0.1)
