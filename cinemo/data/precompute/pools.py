"""Who does what on a cluster: pools of processes that grow and shrink with its nodes, up to the recipe's limits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from cinemo.config import Recipe
from cinemo.progress import say
from cinemo.types import InputError, RunError

# What a decoder leaks ends with its process. And options unlike an actor's keep Ray Data from decoding inside one.
_DECODING = {"max_calls": 500}
# It mostly waits for storage. And decoding reserves all cores there are: asking for any share, a commit would get none
# before the last clip is decoded, and a killed run would have nothing to go on from.
COMMIT_CPUS = 0.0
# So many at a time: a slow storage must not be met with ever more processes, each holding a shard.
_CPUS_PER_COMMIT = 8
LEAST_COMMITS = 2
_FEW_CPUS = 4
_SAY_SECONDS = 30.0


@dataclass(frozen=True)
class Pools:
    """Processes at a time on the nodes of this moment, and what Ray reserves for each of them.

    ``decode`` and ``encode`` are options of Ray Data's ``map_batches``; with ``data.together`` the latter is not used.
    """

    decoders: int
    encoders: int
    commits: int
    decode: dict[str, Any]
    encode: dict[str, Any]

    @property
    def capacity(self) -> dict[str, float]:
        return {"decode": self.decoders, "encode": self.encoders}


def pools(recipe: Recipe) -> Pools:
    """Decoding takes cores, of the nodes that offer ``data.decode_resource`` where it is set; encoders take theirs,
    of those that offer ``data.encode_resource``.

    Pools have no size of their own but the recipe's limits: Ray Data gives them what the cluster has at the time.
    """
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    data, have = recipe.data, ray.cluster_resources()
    cpus, gpus, special = int(have.get("CPU", 1)), have.get("GPU", 0), data.decode_resource
    decode: dict[str, Any] = {
        **_DECODING,
        "num_cpus": data.decode_cpus,
        "compute": TaskPoolStrategy(size=data.decode_tasks or None),
    }
    if special:
        decode["resources"] = {special: data.decode_cpus}
    decoders = max(1, int((have.get(special, 0) if special else cpus) / data.decode_cpus))
    decoders = min(decoders, data.decode_tasks or decoders)

    # On accelerators, and on few cores, all work from the beginning; on many cores Ray adds encoders while clips wait.
    # On few it would stop and start them again and again, each time for seconds of imports.
    if data.encode_resource:
        fitting = max(1, int(have.get(data.encode_resource, 0)))
    else:
        fitting = max(1, int(gpus / data.encode_gpus) if data.encode_gpus else cpus)
    encoders = min(fitting, data.encode_actors or fitting)
    theirs = data.encode_gpus or data.encode_resource  # something that limits their number, and only they take
    least = encoders if theirs or data.encode_actors or cpus <= _FEW_CPUS else 1
    # An encoder takes a core where one is left for decoding.
    share = 1.0 if cpus >= least + 2 else 0.0
    # Nothing but its own resources would limit a pool without a size.
    most = data.encode_actors or (None if joined() and (theirs or share) else encoders)
    encode = {
        "num_cpus": share,
        "compute": ActorPoolStrategy(min_size=least, max_size=most),
        **({"num_gpus": data.encode_gpus} if data.encode_gpus else {}),
        **({"resources": {data.encode_resource: 1.0}} if data.encode_resource else {}),
    }
    return Pools(
        decoders=decoders,
        encoders=decoders if data.together else encoders,
        commits=max(LEAST_COMMITS, cpus // _CPUS_PER_COMMIT),
        decode=decode,
        encode=encode,
    )


def joined() -> bool:
    """Whether this is a cluster that others started, and that may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def wait_for_nodes(recipe: Recipe) -> None:
    """See that the cluster has what the recipe needs. An autoscaler is shown what is missing and is waited for.

    Raises:
        InputError: it is missing, and nobody is going to add it.
        RunError: it did not come within ``data.wait_for_nodes`` seconds.
    """
    data, special = recipe.data, recipe.data.decode_resource
    actors = max(1, data.encode_actors)
    if data.encode_resource:
        what = f"data.encode_resource is {data.encode_resource!r}, of which the cluster has"
        bundle = {data.encode_resource: 1.0} | ({"GPU": data.encode_gpus} if data.encode_gpus else {})
        _wait(bundle, actors, recipe, what, "--set data.encode_resource=null does without")
    elif data.encode_gpus:
        what = f"data.encode_gpus is {data.encode_gpus:g} for {actors} encoder{'s' * (actors > 1)}"
        way_out = "--set data.encode_gpus=0 encodes on CPUs"
        _wait({"GPU": data.encode_gpus}, actors, recipe, f"{what}, but the cluster has", way_out)
    if special:
        what = f"data.decode_resource is {special!r}, of which the cluster has"
        bundle = {special: data.decode_cpus, "CPU": data.decode_cpus}
        _wait(bundle, 1, recipe, what, "--set data.decode_resource=null does without")
    _wait({"CPU": data.decode_cpus}, 1, recipe, "the cluster has", "add a node with cores")


def _wait(bundle: dict[str, float], count: int, recipe: Recipe, what: str, way_out: str) -> None:
    """Until the cluster has what ``count`` processes take of the first resource of ``bundle``, each all of it."""
    name, each = next(iter(bundle.items()))
    wanted = each * count

    def have() -> float:
        return float(ray.cluster_resources().get(name, 0.0))

    if have() >= wanted:
        return
    limit = recipe.data.wait_for_nodes
    called = {"GPU": "accelerators", "CPU": "cores"}.get(name, name)
    if not joined() or not limit:
        raise InputError(f"{what} {have():g} {called}; {way_out}")
    ask_for_nodes(
        [bundle] * count,
        lambda: have() >= wanted,
        limit,
        lambda: f"waiting for {wanted:g} {called}: {what} {have():g}",
    )
    if (came := have()) >= wanted:
        say(f"the cluster has {came:g} {called} now")
    elif came >= each:
        say(f"going on with {came:g} {called} of {wanted:g}: no more came within {limit:g} s")
    else:
        raise RunError(f"{what} {came:g} {called}, and no more came within {limit:g} s; {way_out}")


def ask_for_nodes(
    bundles: list[dict[str, float]], came: Callable[[], bool], limit: float, waiting: Callable[[], str]
) -> None:
    """Show an autoscaler what is missing, until it ``came`` or for ``limit`` seconds.

    Args:
        bundles: resources of processes, each of which needs a node with room for all of its own.
        waiting: the line to say every half a minute; how long it has been is added.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    # A placement group that cannot be placed is what every autoscaler acts on, and it goes with this process.
    begun = time.monotonic()
    request = placement_group(bundles, strategy="PACK")
    try:
        while (waited := time.monotonic() - begun) < limit and not came():
            say(f"{waiting()}; {waited:.0f} of {limit:g} s")
            request.wait(min(_SAY_SECONDS, limit - waited))
    finally:
        remove_placement_group(request)
