"""A discrete-event simulation of a precompute cluster: how long a run takes, and what its node hours are spent on.

What is simulated is what `cinemo.data.precompute.graph` does on Ray Data. The driver hands out blocks of clips in
planned order at a bounded rate. A slot of a node fetches and decodes one block at a time; accelerators encode what was
decoded, where there are any. Results leave in order, so a block that is late holds back what comes after it, and no
more than a window of blocks may be unfinished or waiting. A spot node is taken away now and then: what ran on it and
what it held is done again elsewhere, and a new node comes later. Storage gives so many objects a second.

Left out: network bandwidth, memory, faults of accelerator nodes, and the driver's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from cinemo.types import keyed_seed


@dataclass(frozen=True)
class Work:
    """Clips and what one of them takes.

    ``seconds``, ``spread``: mean of the seconds of a core for a clip, and their standard deviation by the mean
    (lognormal). ``stalled``: share of clips that run into a timeout of ``stall_seconds``. ``encode_seconds``: of an
    accelerator for a clip; 0: encoding is in ``seconds``. ``block``: clips that a task takes at most.
    """

    clips: int
    seconds: float
    spread: float = 0.5
    stalled: float = 0.0
    stall_seconds: float = 120.0
    encode_seconds: float = 0.0
    block: int = 16
    shard: int = 256

    def blocks(self) -> int:
        return math.ceil(self.clips / self.block)


@dataclass(frozen=True)
class Fleet:
    """Nodes and what happens to them.

    ``interrupted_hours``: mean time until a spot node is taken away; None: never. ``notice``: seconds before, in which
    it takes no new block. ``provision``: seconds until another takes its place. ``boot``: until a new node's processes
    have imported what they need. ``taken``: nodes that are taken away once without notice, and at which second.
    """

    nodes: int
    slots: int
    accelerators: int = 0
    interrupted_hours: float | None = None
    notice: float = 120.0
    provision: float = 180.0
    boot: float = 30.0
    taken: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Limits:
    """Of storage (objects a second in all) and of Ray's driver: tasks a second, and blocks at a time for each slot."""

    objects_per_second: float = math.inf
    tasks_per_second: float = math.inf
    window: float = 4.0


@dataclass
class Result:
    """Where the paid slot seconds of the nodes went; they add up to ``paid``.

    ``useful``: work on blocks that were committed; ``lost``: on blocks that were done again; ``booting``; ``waiting``
    for storage, or ``idle``: no block to be had (the driver, the window, the encoders, or the end of the run).
    """

    seconds: float = 0.0
    paid: float = 0.0
    useful: float = 0.0
    lost: float = 0.0
    waiting: float = 0.0
    booting: float = 0.0
    interruptions: int = 0
    again: int = 0
    accelerator_busy: float = 0.0
    committed: int = 0
    longest_hold: int = 0  # blocks that waited behind a late one
    shards: list[float] = field(default_factory=list)  # seconds at which shards were committed

    @property
    def idle(self) -> float:
        return self.paid - self.useful - self.lost - self.waiting - self.booting

    def shares(self) -> dict[str, float]:
        return {name: getattr(self, name) / self.paid for name in ("useful", "lost", "waiting", "booting", "idle")}


def simulate(work: Work, fleet: Fleet, limits: Limits = Limits(), seed: int = 0) -> Result:
    """Run a whole dataset. The same arguments give the same result.

    Raises:
        ValueError: encoding needs accelerators, and there are none.
    """
    if work.encode_seconds and not fleet.accelerators:
        raise ValueError(f"{work.encode_seconds:g} s a clip to encode, but no accelerators")
    return _Run(work, fleet, limits, seed).run()


class _Run:
    def __init__(self, work: Work, fleet: Fleet, limits: Limits, seed: int) -> None:
        self.work, self.fleet, self.limits = work, fleet, limits
        self.rng = np.random.default_rng(keyed_seed(seed, "simulation"))
        self.env = simpy.Environment()
        self.result = Result()
        self.total = work.blocks()
        self.seconds = _block_seconds(work, self.rng)
        self.ready: Any = simpy.PriorityStore(self.env)  # block numbers that slots take, the earliest first
        self.decoded: Any = simpy.Store(self.env, capacity=max(1, 2 * fleet.accelerators))
        self.front, self.held = 0, set[int]()
        self.where: dict[int, _Node] = {}  # of finished blocks that wait for their turn
        self.moved, self.ended = self.env.event(), self.env.event()
        self.next_object = 0.0  # when storage is free again

    def run(self) -> Result:
        nodes = [_Node(self, number) for number in range(self.fleet.nodes)]
        self.env.process(self.driver())
        for _ in range(self.fleet.accelerators):
            self.env.process(self.encoder())
        self.env.run(self.ended)
        self.result.seconds = self.env.now
        for node in nodes:
            node.settle()
        return self.result

    def driver(self) -> Iterator[Any]:
        window = max(1, round(self.limits.window * self.fleet.nodes * self.fleet.slots))
        for block in range(self.total):
            while block >= self.front + window:
                self.moved = self.env.event()
                yield self.moved
            yield self.ready.put(block)
            if self.limits.tasks_per_second < math.inf:
                yield self.env.timeout(1 / self.limits.tasks_per_second)

    def encoder(self) -> Iterator[Any]:
        while True:
            block, node = yield self.decoded.get()
            yield self.env.timeout(self.work.encode_seconds * self.work.block)
            self.result.accelerator_busy += self.work.encode_seconds * self.work.block
            self.finish(block, node)

    def fetch_delay(self, clips: int) -> float:
        """Storage serves in order of arrival, at its rate."""
        if self.limits.objects_per_second == math.inf:
            return 0.0
        self.next_object = max(self.env.now, self.next_object) + clips / self.limits.objects_per_second
        return self.next_object - self.env.now

    def finish(self, block: int, node: _Node) -> None:
        if block < self.front or block in self.held:
            return  # done twice: it was lost while it waited for its encoder, and came back
        self.held.add(block)
        self.where[block] = node
        per_shard = max(1, self.work.shard // self.work.block)
        while self.front in self.held:
            self.held.remove(self.front)
            del self.where[self.front]
            self.front += 1
            if self.front % per_shard == 0 or self.front == self.total:
                self.result.shards.append(self.env.now)
        self.result.committed = self.front
        self.result.longest_hold = max(self.result.longest_hold, len(self.held))
        if not self.moved.triggered:
            self.moved.succeed()
        if self.front == self.total and not self.ended.triggered:
            self.ended.succeed()

    def lose(self, blocks: list[int]) -> None:
        for block in blocks:
            self.held.discard(block)
            self.where.pop(block, None)
            self.result.again += 1
            self.ready.put(block)


class _Node:
    """One place in the fleet: a node, and the ones that follow it when it is taken away."""

    def __init__(self, run: _Run, number: int) -> None:
        self.run, self.env = run, run.env
        self.rng = np.random.default_rng(keyed_seed(number, "node", int(run.rng.integers(1 << 30))))
        self.since = 0.0
        self.leaving = False
        self.taken = dict(run.fleet.taken).get(number)
        self.busy: dict[Any, tuple[float, float, float]] = {}  # slot: work and wait seconds of its block, begun
        self.env.process(self.live())

    def live(self) -> Iterator[Any]:
        fleet = self.run.fleet
        while True:
            self.since, self.leaving = self.env.now, False
            yield self.env.timeout(fleet.boot)
            self.run.result.booting += fleet.boot * fleet.slots
            slots = [self.env.process(self.slot(number)) for number in range(fleet.slots)]
            if self.taken is not None:
                yield self.env.timeout(max(0.0, self.taken - self.env.now))
                self.taken = None
            elif fleet.interrupted_hours is None:
                return
            else:
                life = self.rng.exponential(fleet.interrupted_hours * 3600)
                yield self.env.timeout(max(0.0, life - fleet.notice))
                self.leaving = True
                yield self.env.timeout(min(life, fleet.notice))
            self.run.result.interruptions += 1
            for slot in slots:
                if slot.is_alive:
                    slot.interrupt()
            held = [block for block, node in self.run.where.items() if node is self]
            for block in held:
                self.run.result.useful -= self.run.seconds[block]
                self.run.result.lost += self.run.seconds[block]
            self.run.lose(held)
            self.run.result.paid += (self.env.now - self.since) * fleet.slots
            self.since = math.nan
            yield self.env.timeout(fleet.provision)

    def slot(self, number: int) -> Iterator[Any]:
        run = self.run
        while not self.leaving:
            asked = run.ready.get()
            try:
                block = yield asked
            except simpy.Interrupt:
                if asked.triggered:
                    run.ready.put(asked.value)
                else:
                    asked.cancel()
                return
            if self.leaving:
                run.ready.put(block)
                return
            wait, work = run.fetch_delay(run.work.block), float(run.seconds[block])
            self.busy[number] = (self.env.now, wait, work)
            try:
                yield self.env.timeout(wait + work)
                run.result.waiting += wait
                run.result.useful += work
                del self.busy[number]
                if run.work.encode_seconds:
                    yield run.decoded.put((block, self))
                else:
                    run.finish(block, self)
            except simpy.Interrupt:
                if number in self.busy:
                    begun, wait, _ = self.busy.pop(number)
                    waited = min(wait, self.env.now - begun)
                    run.result.waiting += waited
                    run.result.lost += self.env.now - begun - waited
                else:
                    run.result.useful -= work
                    run.result.lost += work
                run.lose([block])
                return

    def settle(self) -> None:
        """The end of the run: what this node is paid for until then."""
        if math.isnan(self.since):
            return
        self.run.result.paid += (self.env.now - self.since) * self.run.fleet.slots
        if self.env.now - self.since < self.run.fleet.boot:
            self.run.result.booting += (self.env.now - self.since) * self.run.fleet.slots
        for begun, wait, _ in self.busy.values():
            spent = self.env.now - begun
            self.run.result.waiting += min(wait, spent)
            self.run.result.lost += max(0.0, spent - wait)


def _block_seconds(work: Work, rng: np.random.Generator) -> np.ndarray:
    """(blocks,) float32: seconds of a slot."""
    sigma = math.sqrt(math.log(1 + work.spread**2))
    made, total = [], work.blocks()
    for start in range(0, total, 1 << 16):
        shape = (min(1 << 16, total - start), work.block)
        clips = (
            rng.lognormal(math.log(work.seconds) - sigma**2 / 2, sigma, shape)
            if sigma
            else np.full(shape, work.seconds)
        )
        if work.stalled:
            clips += work.stall_seconds * (rng.random(shape) < work.stalled)
        made.append(clips.sum(1).astype(np.float32))
    seconds = np.concatenate(made)
    seconds[-1] *= (work.clips - (total - 1) * work.block) / work.block
    return seconds
