"""The Kubernetes manifests name commands, recipes, keys and versions that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from cinemo.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PINNED_RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def ray_job() -> dict[str, dict[str, str]]:
    loaded: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "ray_job.yaml").read_text())
    return loaded


def test_the_ray_job_runs_the_entry_points_with_a_recipe_that_loads() -> None:
    spec = ray_job()["spec"]
    scripts = re.findall(r"python (pipelines/\w+\.py)", spec["entrypoint"])
    assert scripts == ["pipelines/precompute.py", "pipelines/train.py"]
    assert all((ROOT / script).is_file() for script in scripts)
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert set(re.findall(r"\$(\w+)", spec["entrypoint"])) <= set(environment)
    assignments = [word for word in shlex.split(environment["RECIPE_SET"]) if word != "--set"]
    recipe = load_recipe("cinemo-320x512", assignments)
    assert recipe.encoders.vae.startswith("s3://")


@pytest.mark.parametrize("name", ["ray_job.yaml", "cluster/ray_cluster.yaml"])
def test_versions_are_the_pinned_one(name: str) -> None:
    assert PINNED_RAY
    text = (ROOT / name).read_text()
    assert set(re.findall(r'rayVersion: "([^"]+)"', text)) == {PINNED_RAY[1]}
    assert f"rayproject/ray:{PINNED_RAY[1]}-" in (ROOT / "cluster/Dockerfile").read_text()


def test_every_ray_cluster_asks_for_a_token() -> None:
    """Whoever reaches the dashboard or the GCS of an open cluster can run code on all of it."""
    found = []
    for path in (*ROOT.glob("*.yaml"), *ROOT.glob("cluster/*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            spec = document.get("spec", {})
            spec = {
                "RayCluster": spec,
                "RayJob": spec.get("rayClusterSpec"),
                "RayService": spec.get("rayClusterConfig"),
            }.get(document.get("kind"))
            if spec is not None:
                found.append(path.name)
                assert spec["authOptions"] == {"mode": "token"}, path.name
    assert sorted(found) == ["ray_cluster.yaml", "ray_job.yaml"]


def test_the_cluster_can_hold_the_paper_recipe() -> None:
    groups = yaml.safe_load((ROOT / "ray_job.yaml").read_text())["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = sum(
        int(group["replicas"]) * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        for group in groups
        for container in group["template"]["spec"]["containers"]
    )
    train = load_recipe("cinemo-320x512").train
    assert gpus >= train.workers * train.gpus_per_worker


@pytest.mark.parametrize("name", ["ray_job.yaml", "cluster/ray_cluster.yaml"])
def test_decoding_has_nodes_of_its_own(name: str) -> None:
    """Those that offer the resource the job's recipe asks for: one unit a core, and no accelerator."""
    assignments = shlex.split(yaml.safe_load(ray_job()["spec"]["runtimeEnvYAML"])["env_vars"]["RECIPE_SET"])
    wanted = load_recipe("cinemo-320x512", [word for word in assignments if word != "--set"]).data.decode_resource
    spec = yaml.safe_load((ROOT / name).read_text())["spec"]
    groups = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    offers = {}
    for group in groups:
        found = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        if wanted in found:
            offers[group["groupName"]] = found[wanted]
            (container,) = group["template"]["spec"]["containers"]
            assert int(container["resources"]["limits"]["cpu"]) == found[wanted]
            assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert offers
