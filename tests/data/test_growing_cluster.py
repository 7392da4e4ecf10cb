"""Clusters that grow and shrink while a run is on, and those that have yet to grow before it can begin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data.small_data import film

from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.precompute import pools
from cinemo.media.mp4 import write_video
from cinemo.recipes import override
from cinemo.types import InputError, RunError

ROOT = Path(__file__).resolve().parents[2]
CLIPS = 1200

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def no_ray() -> Iterator[None]:
    """Clusters of these tests' own, with no other one in this process."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


def test_accelerators_that_are_missing_are_requested_and_waited_for(
    small_recipe: Recipe, no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node comes once the request stands, as an autoscaler would see it."""
    import ray
    from ray.cluster_utils import Cluster

    from cinemo.data.precompute.cluster import connect

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)

    def pending() -> list[dict[str, float]]:
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] == "PENDING"]
        return [dict(bundle) for group in groups for bundle in group["bundles"].values()]

    try:
        connect()
        recipe = override(small_recipe, ["data.encode_gpus=1", "data.encode_actors=2", "data.wait_for_nodes=200"])
        with pytest.raises(InputError, match="for 2 encoders, but the cluster has 0 accelerators"):
            pools.wait_for_nodes(override(recipe, ["data.wait_for_nodes=0"]))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(pools.wait_for_nodes, recipe)
            while not pending():
                assert not waiting.done()
                time.sleep(0.1)
            assert pending() == [{"GPU": 1.0}, {"GPU": 1.0}]
            cluster.add_node(num_cpus=1, num_gpus=2)
            waiting.result()
        said = capsys.readouterr().out
        assert "waiting for 2 accelerators: data.encode_gpus is 1 for 2 encoders, but the cluster has 0" in said
        assert "the cluster has 2 accelerators now" in said
        assert (pools.pools(recipe).encoders, pools.pools(recipe).encode["num_gpus"]) == (2, 1)

        pools.wait_for_nodes(override(recipe, ["data.encode_actors=5", "data.wait_for_nodes=2"]))
        assert "going on with 2 accelerators of 5: no more came within 2 s" in capsys.readouterr().out
        with pytest.raises(RunError, match="of which the cluster has 0 decode, and no more came within 1 s"):
            pools.wait_for_nodes(override(recipe, ["data.decode_resource=decode", "data.wait_for_nodes=1"]))
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.release
def test_a_node_that_comes_is_used_and_one_that_goes_is_no_loss(
    small_recipe: Recipe, no_ray: None, tmp_path: Path
) -> None:
    """Also where the first node with a core has yet to come, as the head has none: the run says what it waits for."""
    import ray
    from ray.cluster_utils import Cluster

    write_video(tmp_path / "film.mp4", film("one", 40), 25)
    rows = [{"clip_id": f"clip-{k}", "uri": str(tmp_path / "film.mp4"), "caption": "a film"} for k in range(CLIPS)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = override(small_recipe, ["data.encode_actors=0", "data.clips_per_shard=100"])
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    output = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": cluster.address}
    command = [sys.executable, ROOT / "pipelines/precompute.py", "--recipe", tmp_path / "recipe.json"]
    command += ["--manifest", tmp_path / "m.jsonl", "--output", output, "--set", "data.wait_for_nodes=300"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()

    def until(what: str, happened: object) -> None:
        deadline = time.monotonic() + 240
        while not happened():  # type: ignore[operator]
            assert process.poll() is None, f"ended before {what}: {''.join(said)[-3000:]}"
            assert time.monotonic() < deadline, f"{what} did not happen: {''.join(said)[-3000:]}"
            time.sleep(0.1)

    try:
        ray.init(address=cluster.address, logging_level="ERROR")

        def is_busy(node: object) -> bool:
            free = ray._private.state.available_resources_per_node()
            return node.node_id in free and not free[node.node_id].get("CPU")  # type: ignore[attr-defined]

        until("it waited", lambda: any("waiting for 1 cores: the cluster has 0" in line for line in said))
        first = cluster.add_node(num_cpus=1)
        until("a shard was committed", lambda: list(output.glob("shards/*.json")))
        until("the first node worked", lambda: is_busy(first))
        second = cluster.add_node(num_cpus=1)
        until("the second node worked", lambda: is_busy(second))
        cluster.remove_node(second, allow_graceful=False)
        assert process.wait(timeout=240) == 0, "".join(said)[-3000:]
    finally:
        process.kill()
        process.wait()
        ray.shutdown()
        cluster.shutdown()
    assert DatasetIndex.load(str(output)).info["samples"] == CLIPS
