"""Two servers on one machine must not answer each other's clients."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from cinemo.serving import proxy
from cinemo.types import RunError


def listen(port: int) -> socket.socket:
    """As a replica does."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("0.0.0.0", port))
    made.listen()
    return made


def test_replicas_of_two_servers_share_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_HIGHEST_PORT", proxy._LOWEST_PORT + 6 * proxy._PORTS_OF_REPLICAS)  # three ranges
    with ExitStack() as open_sockets:
        taken: list[range] = []
        for _ in range(3):
            ports = {name: int(port) for name, port in proxy._own_ports().items()}
            for kind in ("HTTP", "GRPC"):
                low, high = (ports[f"RAY_SERVE_DIRECT_INGRESS_{bound}_{kind}_PORT"] for bound in ("MIN", "MAX"))
                assert ports[f"RAY_SERVE_FALLBACK_PROXY_{kind}_PORT"] == low - 1
                low -= 1
                assert all(high < other.start or low >= other.stop for other in taken), "a range is given twice"
                taken.append(range(low, high + 1))
            open_sockets.enter_context(listen(taken[-2][-1]))
        with pytest.raises(RunError, match="no 200 consecutive free ports"):
            proxy._own_ports()
