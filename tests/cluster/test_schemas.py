"""Every manifest is what the published schemas allow, and these checks see a misspelt field wherever it stands."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cluster.published import ROOT, SCHEMAS, faults, manifests

# Mappings whose keys are the manifest's own.
FREE = (
    *("labels", "matchLabels", "annotations", "nodeSelector", "selector", "data"),
    *("requests", "limits", "resources", "rayStartParams"),
)
NAMES = [f"{name}-{document['kind']}-{document['metadata']['name']}" for name, document in manifests()]


def mappings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all mappings of a document whose keys are fields."""
    if isinstance(value, dict):
        if not path or path[-1] not in FREE or "requests" in value or "matchLabels" in value:
            yield path
        for key, inner in value.items():
            yield from mappings(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from mappings(inner, (*path, number))


@pytest.mark.parametrize("document", [document for _, document in manifests()], ids=NAMES)
def test_a_manifest_is_valid_and_a_misspelt_field_is_seen(document: dict[str, Any]) -> None:
    assert list(faults(document)) == []
    wrong = json.loads(json.dumps(document))  # without YAML's anchors, so that one place changes at a time
    paths = list(mappings(document))
    assert len(paths) > 1
    for path in paths:
        place = wrong
        for key in path:
            place = place[key]
        place["mispelt"] = "x"
        assert next(faults(wrong), None), f"an unknown field at {path} was not seen"
        del place["mispelt"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ray_cluster.yaml", {"spec.headGroupSpec.template.spec.containers.0.resources.requests.memory": ["20Gi"]}),
        ("ray_cluster.yaml", {"spec.workerGroupSpecs.0.maxReplicas": "64"}),
        ("ray_cluster.yaml", {"spec.authOptions.mode": "tokens"}),
        ("ray_cluster.yaml", {"spec.workerGroupSpecs.0.resources.decode": 30}),
        ("precompute_job.yaml", {"spec.submissionMode": "K8sJob"}),
        ("mlflow.yaml", {"spec.ports.0.port": None}),
    ],
)
def test_a_wrong_value_is_seen(name: str, change: dict[str, Any]) -> None:
    document = copy.deepcopy(next(document for file, document in manifests() if file == name))
    for path, value in change.items():
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
        place: Any = document
        for key in keys:
            place = place[key]
        assert last in place
        place[last] = value
    assert list(faults(document))


def test_a_kind_without_a_schema_is_a_fault() -> None:
    assert list(faults({"apiVersion": "v1", "kind": "Pods"})) == ["no schema for v1 Pods"]


def test_every_file_is_looked_at() -> None:
    """`serve.yaml` and `aws.yaml` are no manifests: Serve and Ray have schemas of their own."""
    looked_at = {name for name, _ in manifests()} | {"serve.yaml", "aws.yaml"}
    assert {path.name for path in (ROOT / "cluster").glob("*.y*ml")} | {"ray_job.yaml"} == looked_at
    assert sum(path.stat().st_size for path in SCHEMAS.iterdir()) < 200_000


def test_ray_up_is_valid_and_a_misspelt_key_is_seen() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["decode"]["max_workers"] == 64
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    for change in ({"idle_timeout_minute": 5}, {"max_workers": "67"}, {"provider": {"region": "us-east-1"}}):
        with pytest.raises(Exception, match=r"minute|67|type"):
            validate_config(prepare_config(copy.deepcopy(config) | change))
