"""Whose job is next, as laws."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cinemo.serving.store.fairness import fair_order

CLIENTS = st.sampled_from("abcde")
CANDIDATES = st.lists(CLIENTS, max_size=25).map(lambda clients: [(client, n) for n, client in enumerate(clients)])
RUNNING = st.dictionaries(CLIENTS, st.integers(0, 5))
TURNS = st.lists(CLIENTS, unique=True).map(lambda clients: {client: n for n, client in enumerate(clients)})


@given(CANDIDATES, RUNNING, TURNS)
def test_everybody_is_served_once_and_a_client_in_the_order_it_asked(
    candidates: list[tuple[str, int]], running: dict[str, int], turns: dict[str, int]
) -> None:
    order = list(fair_order(reversed(candidates), running, turns))
    assert sorted(order, key=lambda pair: pair[1]) == candidates
    for client in {client for client, _ in candidates}:
        numbers = [number for name, number in order if name == client]
        assert numbers == sorted(numbers)


@given(CANDIDATES, RUNNING, TURNS)
def test_nobody_is_ahead_of_a_waiting_client_that_runs_less(
    candidates: list[tuple[str, int]], running: dict[str, int], turns: dict[str, int]
) -> None:
    order = list(fair_order(candidates, running, turns))
    busy = Counter(running)
    for at, (client, _) in enumerate(order):
        waiting = {name for name, _ in order[at:]}
        assert busy[client] == min(busy[name] for name in waiting)
        busy[client] += 1


@given(CANDIDATES, TURNS)
def test_among_equals_who_was_never_served_is_first_then_the_longest_ago(
    candidates: list[tuple[str, int]], turns: dict[str, int]
) -> None:
    order = list(fair_order(candidates, {}, turns))
    firsts = list(dict.fromkeys(client for client, _ in order))
    assert firsts == [client for client, _ in order[: len(firsts)]], "each once before anybody twice"
    known = [turns[client] for client in firsts if client in turns]
    assert known == sorted(known)
    assert all(client in turns for client in firsts[len(firsts) - len(known) :])
