"""Kubernetes manifests against the published schemas in `schemas/`, strictly: an unknown field is a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = Path(__file__).resolve().parent / "schemas"

_CONTENTS = {path.name: json.loads(path.read_text()) for path in sorted(SCHEMAS.glob("*.json"))}
_REGISTRY: Registry[Any] = Registry().with_resources(
    (name, DRAFT202012.create_resource(content)) for name, content in _CONTENTS.items()
)


def _kinds() -> Iterator[tuple[tuple[str, str], str]]:
    for name, content in _CONTENTS.items():
        for definition, schema in content["$defs"].items():
            fields = schema.get("properties", {})
            if not {"apiVersion", "kind", "metadata"} <= set(fields):
                continue
            versions, kinds = (
                [field["const"]] if "const" in field else field.get("enum", [])
                for field in (fields["apiVersion"], fields["kind"])
            )
            yield from (((version, kind), f"{name}#/$defs/{definition}") for version in versions for kind in kinds)


_PLACES = dict(_kinds())


def faults(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a manifest, each with the path to it; a kind without a schema is a fault too."""
    place = _PLACES.get((document.get("apiVersion", ""), document.get("kind", "")))
    if place is None:
        yield f"no schema for {document.get('apiVersion')} {document.get('kind')}"
        return
    for error in Draft202012Validator({"$ref": place}, registry=_REGISTRY).iter_errors(document):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


@cache
def manifests() -> list[tuple[str, dict[str, Any]]]:
    """(file, document) of every Kubernetes manifest of the repository."""
    found = []
    for path in (ROOT / "ray_job.yaml", *sorted((ROOT / "cluster").glob("*.yaml"))):
        documents = list(yaml.safe_load_all(path.read_text()))
        found += [(path.name, document) for document in documents if "apiVersion" in document]
    return found


@cache
def ray_clusters() -> dict[str, dict[str, Any]]:
    """The ``RayClusterSpec`` of every file that has one."""
    places = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    found = {}
    for name, document in manifests():
        if document["kind"] in places:
            spec = document["spec"]
            for key in places[document["kind"]]:
                spec = spec[key]
            found[name] = spec
    return found


@cache
def pods() -> list[tuple[str, dict[str, Any]]]:
    """(file and name, pod template) of everything that runs."""
    found = []
    for name, spec in ray_clusters().items():
        found.append((f"{name} head", spec["headGroupSpec"]["template"]))
        found += [(f"{name} {group['groupName']}", group["template"]) for group in spec["workerGroupSpecs"]]
    for name, document in manifests():
        if document["kind"] in ("Deployment", "StatefulSet"):
            found.append((f"{name} {document['metadata']['name']}", document["spec"]["template"]))
    return found
