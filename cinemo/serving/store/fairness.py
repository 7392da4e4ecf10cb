"""Whose job is next: the client with the fewest running jobs, then the one served longest ago, then the oldest job."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping


def fair_order(
    candidates: Iterable[tuple[str, int]], running: Mapping[str, int], turns: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    """The candidates in the order in which they are to be served, each counted as running once it was yielded.

    Args:
        candidates: ``(client, job number)``; the lower number is the older job.
        running: jobs of a client that run now; absent = none.
        turns: when a client was last served, as a number that grows; absent = never.
    """
    queues: dict[str, deque[int]] = {}
    for client, number in sorted(candidates, key=lambda candidate: candidate[1]):
        queues.setdefault(client, deque()).append(number)
    busy, last = Counter(running), dict(turns)
    turn = max(last.values(), default=0)
    while queues:
        client = min(queues, key=lambda name: (busy[name], last.get(name, -1), queues[name][0]))
        yield client, queues[client].popleft()
        if not queues[client]:
            del queues[client]
        busy[client] += 1
        turn += 1
        last[client] = turn
