"""The manifests agree with the code, with each other and with the machines they name."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from typing import Any

import pytest
import yaml
from cluster.machines import Quantity, allocatable, usage_classes
from cluster.published import ROOT, manifests, pods, ray_clusters

import cinemo
from cinemo import cli
from cinemo.config import Recipe
from cinemo.data.precompute import pools
from cinemo.serving.settings import parse_settings, read_config

PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
DOCUMENT = (ROOT / "docs/cluster.md").read_text()
JOBS = {
    "precompute_job.yaml": ["precompute"],
    "train_job.yaml": ["train"],
    "ray_job.yaml": ["precompute", "train"],
}
_SYSTEM = {"cpu": Quantity("1"), "memory": Quantity("2Gi")}  # what DaemonSets of a node take: network, storage, logs


def document(name: str, kind: str) -> dict[str, Any]:
    return next(found for file, found in manifests() if file == name and found["kind"] == kind)


class _Parsed(Exception):
    """A script got as far as its recipe."""


def commands(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Recipe]]:
    """(script, arguments, recipe) of each entry point that a RayJob runs, as the script itself parses them."""
    spec = document(name, "RayJob")["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    line = spec["entrypoint"]
    assert set(re.findall(r"\$(\w+)", line)) <= set(environment)
    for variable, value in environment.items():
        line = line.replace(f'"${variable}"', value).replace(f"${variable}", value)
    words = shlex.split(line)
    if words[:2] == ["sh", "-c"]:
        words = shlex.split(words[2])
    found: list[tuple[str, Any, Recipe]] = []
    recipe_of = cli.recipe_of

    def stop(arguments: Any) -> Recipe:
        found.append((script, arguments, recipe_of(arguments)))
        raise _Parsed

    monkeypatch.setattr(cli, "recipe_of", stop)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        python, path, *flags = words[:end]
        words = words[end + 1 :]
        assert python == "python"
        assert (ROOT / path).is_file()
        script = path.removeprefix("pipelines/").removesuffix(".py")
        entry = __import__(f"pipelines.{script}", fromlist=["main"]).main
        with pytest.raises(_Parsed):
            entry(flags)
    return found


@pytest.mark.parametrize("name", JOBS)
def test_a_ray_job_runs_our_commands_with_a_recipe_that_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(name, monkeypatch)
    assert [script for script, _, _ in found] == JOBS[name]
    for script, arguments, recipe in found:
        assert recipe.name == "cinemo-320x512"
        assert arguments.output.startswith("s3://")
        if script == "train":
            assert arguments.resume == "auto", "a retried job goes on"
            assert not re.search("^models/", recipe.encoders.vae), "a node has no such folder"
    if len(found) == 2:
        assert [source.partition("=")[0] for source in found[1][1].data] == [found[0][1].output]


def bundles_asked_for(found: list[tuple[str, Any, Recipe]], monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What each command shows the autoscaler on a cluster that has nothing yet."""
    from cinemo.training.run import worker

    asked: list[list[Any]] = []
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    for module in (pools, worker):
        monkeypatch.setattr(module, "ask_for_nodes", lambda bundles, *_: asked.append(bundles))
        monkeypatch.setattr(module.ray, "cluster_resources", dict)
    monkeypatch.setattr(worker.ray, "nodes", list)
    monkeypatch.setattr(worker, "connect", lambda **_: None)
    for script, _, recipe in found:
        if script == "train":
            with pytest.raises(Exception, match="add nodes"):
                worker._join_cluster(recipe)
            continue
        # Each of its waits ends without the nodes: one after the other is looked at.
        for without in ({}, {"encode": 1e9, "GPU": 1e9}):
            have = {"CPU": 0.0} | without
            monkeypatch.setattr(pools.ray, "cluster_resources", lambda have=have: have)
            with pytest.raises(Exception, match="no more came"):
                pools.wait_for_nodes(recipe)
    return asked


def launched(spec: dict[str, Any], bundles: list[dict[str, float]]) -> dict[str, int]:
    """Nodes by group that Ray's autoscaler starts for these processes on an empty cluster of such a spec."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    resource = {"metadata": {"name": "cinemo", "namespace": "cinemo"}, "spec": copy.deepcopy(spec)}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True)
    requests = [ResourceRequestUtil.make(dict(bundle)) for bundle in bundles]
    gang = GangResourceRequest(requests=requests)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=[gang],
        )
    )
    assert not reply.infeasible_gang_resource_requests, f"no group has room for {bundles}"
    return {request.instance_type: request.count for request in reply.to_launch}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("precompute_job.yaml", [{"encode": 1}, {"decode": 1}]),
        ("train_job.yaml", [{"train": 1}]),
        ("ray_job.yaml", [{"encode": 1}, {"decode": 1}, {"train": 1}]),
    ],
)
def test_what_a_command_asks_for_starts_the_nodes_that_are_meant(
    name: str, expected: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the job's own cluster and in the standing one, by Ray's own reading of the spec and its own scheduler."""
    asked = bundles_asked_for(commands(name, monkeypatch), monkeypatch)
    for spec in (ray_clusters()[name], ray_clusters()["ray_cluster.yaml"]):
        assert [launched(spec, bundles) for bundles in asked] == expected


def test_groups_start_empty_and_a_group_is_the_same_in_every_file() -> None:
    groups: dict[str, dict[str, Any]] = {}
    for name, spec in ray_clusters().items():
        for group in spec["workerGroupSpecs"]:
            if group["groupName"] != "animate":
                assert (group["replicas"], group["minReplicas"]) == (0, 0), name
            assert groups.setdefault(group["groupName"], group) == group, name
    assert set(groups) == {"decode", "encode", "train", "animate"}
    assert "nvidia.com/gpu" not in json.dumps(groups["decode"])


@pytest.mark.parametrize("name", ray_clusters())
def test_every_ray_cluster_asks_for_a_token_and_is_of_the_pinned_version(name: str) -> None:
    """Whoever reaches the dashboard or the GCS of an open cluster can run code on all of it."""
    spec = ray_clusters()[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "ray_service.yaml"])
def test_a_cluster_that_stands_keeps_the_heads_state(name: str) -> None:
    options = ray_clusters()[name]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis.cinemo.svc:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "cinemo-redis", "key": "password"}


@pytest.mark.parametrize(("name", "pod"), pods(), ids=[name for name, _ in pods()])
def test_a_pod_fits_the_node_that_it_asks_for(name: str, pod: dict[str, Any]) -> None:
    """Beside what Kubernetes, the system and a node's DaemonSets take, and a sidecar of the autoscaler on the head."""
    spec = pod["spec"]
    containers = spec["containers"]
    wanted = {
        key: sum((Quantity(c["resources"]["requests"].get(key, "0")) for c in containers), Quantity("0"))
        for key in ("cpu", "memory", "nvidia.com/gpu")
    }
    if "nodeSelector" not in spec:
        assert wanted["cpu"] <= 2, "runs on any node"
        return
    selector = spec["nodeSelector"]
    room = allocatable(selector["node.kubernetes.io/instance-type"])
    if name.endswith("head"):
        owner = next(found for file, found in ray_clusters().items() if file == name.split()[0])
        for key, value in owner["autoscalerOptions"]["resources"]["requests"].items():
            wanted[key] += Quantity(value)
    for key, value in wanted.items():
        left = room.get(key, 0) - value - _SYSTEM.get(key, 0)
        assert left >= 0, f"{key}: {value} do not fit {room.get(key)}"
        if key in ("cpu", "memory") and not name.endswith("head"):
            assert left <= room[key] / 5, f"{key}: {left} of {room[key]} would lie idle"
    for container in containers:
        limits = container["resources"]["limits"]
        assert limits["memory"] == container["resources"]["requests"]["memory"], (
            "or a node runs out before a limit is met"
        )
    spot = selector["eks.amazonaws.com/capacityType"] == "SPOT"
    assert ("spot" if spot else "on-demand") in usage_classes(selector["node.kubernetes.io/instance-type"])
    tolerated = {each["key"] for each in spec.get("tolerations", [])}
    assert ("spot" in tolerated) == spot
    assert ("nvidia.com/gpu" in tolerated) == bool(wanted["nvidia.com/gpu"])


@pytest.mark.parametrize("group", [g for spec in ray_clusters().values() for g in spec["workerGroupSpecs"]], ids=str)
def test_a_worker_has_time_to_drain_and_memory_for_its_objects(group: dict[str, Any]) -> None:
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    drain, grace = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]), spec["terminationGracePeriodSeconds"]
    assert drain + 15 <= grace, "Ray's processes end after it"
    if spec["nodeSelector"]["eks.amazonaws.com/capacityType"] == "SPOT":
        assert grace <= 110, "a spot node is gone two minutes after its notice"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    objects, shared = int(group["rayStartParams"]["object-store-memory"]), volumes["shm"]["emptyDir"]["sizeLimit"]
    assert objects <= Quantity(shared) <= Quantity(container["resources"]["limits"]["memory"]) / 2
    if "resources" in group:
        (count,) = group["resources"].values()
        limits = container["resources"]["limits"]
        assert count == limits.get("nvidia.com/gpu", limits["cpu"]), "one unit a core, or an accelerator"


def test_pods_mount_what_there_is_and_reach_what_there_is() -> None:
    claims = {found["metadata"]["name"] for _, found in manifests() if found["kind"] == "PersistentVolumeClaim"}
    services = {
        f"{found['metadata']['name']}.cinemo.svc": {port["port"] for port in found["spec"]["ports"]}
        for _, found in manifests()
        if found["kind"] == "Service"
    }
    stateful = {
        found["metadata"]["name"]: {each["metadata"]["name"] for each in found["spec"]["volumeClaimTemplates"]}
        for _, found in manifests()
        if found["kind"] == "StatefulSet"
    }
    for name, pod in pods():
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        there = set(volumes) | stateful.get(name.split()[1], set())
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= there, name
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in claims, name
    assert all(
        found["metadata"].get("namespace") == "cinemo" for _, found in manifests() if found["kind"] != "Namespace"
    )
    for path in (ROOT / "ray_job.yaml", *(ROOT / "cluster").glob("*.yaml")):
        for host, port in re.findall(r"([a-z-]+\.cinemo\.svc)(?::(\d+))?", path.read_text()):
            assert host in services, f"{path.name} names {host}"
            assert not port or int(port) in services[host], f"{path.name} names {host}:{port}"


def test_weights_are_shared_and_shards_lie_on_the_nodes_own_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    from cinemo.cache import FileCache, cache_directory

    monkeypatch.setenv("CINEMO_CACHE", "/cache")
    for name, spec in ray_clusters().items():
        for group in spec["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            if "nvidia.com/gpu" not in container["resources"]["limits"]:
                continue
            assert {"name": "CINEMO_CACHE", "value": "/cache"} in container["env"], name
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounts[str(cache_directory())] == "weights"
            if group["groupName"] != "animate":
                assert mounts[str(FileCache(1).directory)] == "shards"


def test_secrets_are_named_and_never_written() -> None:
    named = set()
    for name, found in manifests():
        assert found["kind"] != "Secret", name
        text = json.dumps(found)
        named |= set(re.findall(r'"secret(?:KeyRef|Ref)": {"name": "([^"]+)"', text))
        for variable, value in re.findall(
            r'"name": "(\w*(?:PASSWORD|SECRET|TOKEN|ACCESS_KEY)\w*)", "value": "(\w+)"', text
        ):
            raise AssertionError(f"{name}: {variable} has the value {value} written down")
        assert not re.search(r"://[^/@\s\"]+:[^/@\s\"]+@", text), f"{name}: a password within a URL"
    assert named == set(re.findall(r"create secret generic (\S+)", DOCUMENT)), "docs/cluster.md makes each of them"


def test_images_are_the_ones_that_are_built_here() -> None:
    ours = {f"cinemo:{cinemo.__version__}", f"cinemo:{cinemo.__version__}-cpu"}
    for name, pod in pods():
        for container in pod["spec"]["containers"]:
            image = container["image"]
            assert image in ours if image.startswith("cinemo") else re.fullmatch(r"[a-z]+:\d[\w.-]+", image), name
            if image.startswith("cinemo") and "ray" in container["name"]:
                assert image.endswith("-cpu") != ("nvidia.com/gpu" in container["resources"]["limits"]), name
    serve = set()
    for name, tag in (("Dockerfile", "cu128"), ("Dockerfile.cpu", "cpu")):
        text = (ROOT / "cluster" / name).read_text()
        assert re.search(rf"^FROM rayproject/ray:{re.escape(PINS['ray'])}-py311-{tag}$", text, re.MULTILINE)
        for source in re.findall(r"^COPY --chown=ray (.+) \S+$", text, re.MULTILINE):
            assert all((ROOT / each).exists() for each in source.split())
        installs = re.findall(r"^RUN pip install (.+)$", text, re.MULTILINE)
        assert installs
        assert all("--constraint constraints.txt" in each for each in installs)
        serve |= set(re.findall(r"^ENV (.+)$", text, re.MULTILINE))
        assert f"cluster/{name} -t {sorted(ours)[name.endswith('cpu')]} ." in text
    assert len(serve) == 1, "the head's controller and the nodes' proxies go by the same settings"
    assert " boto3" in (ROOT / "cluster/Dockerfile.cpu").read_text(), "MLflow's artifacts on S3 need it"


def test_the_service_serves_what_serve_yaml_says() -> None:
    spec = document("ray_service.yaml", "RayService")["spec"]
    config = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    assert yaml.safe_load(spec["serveConfigV2"]) == config
    (application,) = config["applications"]
    settings = parse_settings(application["args"])
    assert parse_settings(read_config(ROOT / "cluster/serve.yaml")[0]) == settings
    module, name = application["import_path"].split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert settings.gpus
    assert settings.cpus
    assert settings.gpus <= int(limits["nvidia.com/gpu"])
    assert settings.cpus <= int(limits["cpu"])
    assert group["maxReplicas"] >= math.ceil(settings.max_replicas * settings.gpus / int(limits["nvidia.com/gpu"]))
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) >= settings.drain_seconds
    assert spec["rayClusterDeletionDelaySeconds"] >= settings.drain_seconds
    port = config["http_options"]["port"]
    (service,) = spec["serveService"]["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (port, port)
    assert {"containerPort": port, "name": "serve"} in container["ports"]
    assert "PGPASSWORD" in environment
    assert settings.require_keys


def test_serve_takes_the_config_file() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "cluster/serve.yaml").read_text()))


def test_mlflow_takes_its_arguments() -> None:
    from mlflow.cli import cli as mlflow
    from sqlalchemy import make_url

    pod = next(pod for name, pod in pods() if name == "mlflow.yaml mlflow")
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    parsed = mlflow.commands["server"].make_context("server", list(container["args"])).params
    assert make_url(parsed["backend_store_uri"]).get_dialect().name == "postgresql"
    assert parsed["artifacts_destination"].startswith("s3://")
    assert parsed["serve_artifacts"]
    clients = {
        yaml.safe_load(document(name, "RayJob")["spec"]["runtimeEnvYAML"])["env_vars"]["MLFLOW_TRACKING_URI"]
        for name in JOBS
    }
    assert clients == {f"http://{parsed['allowed_hosts'].split(',')[0]}"}


def test_prometheus_reads_ports_that_pods_have() -> None:
    read = {
        endpoint["port"]
        for _, found in manifests()
        if found["kind"] == "PodMonitor"
        for endpoint in found["spec"]["podMetricsEndpoints"]
    }
    assert read == {"metrics", "serve"}
    for name, pod in pods():
        if name.split()[0] in ray_clusters():
            ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
            assert "metrics" in ports, name
            assert ("serve" in ports) == name.startswith("ray_service"), name


def test_ray_up_has_nodes_of_the_same_kinds() -> None:
    kinds = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())["available_node_types"]
    groups = {group["groupName"]: group for group in ray_clusters()["ray_cluster.yaml"]["workerGroupSpecs"]}
    assert set(kinds) == {"head", *groups}
    for name, group in groups.items():
        selector = group["template"]["spec"]["nodeSelector"]
        config, resources = kinds[name]["node_config"], kinds[name]["resources"]
        assert config["InstanceType"] == selector["node.kubernetes.io/instance-type"]
        assert ("InstanceMarketOptions" in config) == (selector["eks.amazonaws.com/capacityType"] == "SPOT")
        assert (kinds[name]["min_workers"], kinds[name]["max_workers"]) == (0, group["maxReplicas"])
        assert set(group["resources"]) <= set(resources)
        machine = allocatable(config["InstanceType"])
        assert resources["CPU"] == math.ceil(machine["cpu"])
        assert resources.get("GPU", 0) == machine.get("nvidia.com/gpu", 0)
