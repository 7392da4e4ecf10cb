"""Where the processes of a program listen."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import psutil


def exposed(process: psutil.Process) -> set[str]:
    """``name address:port`` of every socket of a process and its descendants that others than this machine reach."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            for connection in each.net_connections("inet"):
                is_open = connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
                if is_open and not _is_loopback(connection.laddr.ip):
                    found.add(f"{each.name()} {connection.laddr.ip}:{connection.laddr.port}")
    return found


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
