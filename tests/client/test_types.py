"""The client's types, arguments and methods against the server's OpenAPI document: it must know all that is there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_server import card, open_store, small_api

from cinemo.client import AsyncClient, Client, VideoServerError, types
from cinemo.client.types import FINAL, Status
from cinemo.methods import method_class, served_controls

# The types' names in the document, where they differ: this client's Picture is what a person gives it.
NAMES = {"Picture": "PictureInput"}


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    return dict(small_api(open_store(tmp_path)).openapi())


def own_of_the_model() -> set[str]:
    """Fields of a form and a video that the served model's method brings."""
    method = method_class(card().recipe)
    return {info.alias for info in served_controls(card().recipe).values()} | set(method.inputs) | {"inputs"}


def kinds(schema: dict[str, Any]) -> set[str]:
    """The JSON types and references that a schema allows."""
    if "anyOf" in schema:
        return set().union(*(kinds(each) for each in schema["anyOf"]))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return {NAMES.get(name, name)}
    if "const" in schema or "enum" in schema:
        return {"string" if isinstance(schema.get("const", schema.get("enum", [""])[0]), str) else "boolean"}
    if schema.get("type") == "array":
        items = schema.get("prefixItems", [schema["items"]] if "items" in schema else [])
        return {f"array of {' '.join(sorted(set().union(*map(kinds, items))))}" if items else "array"}
    return {schema.get("type", "anything")}


def answers(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schemas that answers are made of, by name."""
    found: dict[str, dict[str, Any]] = {}

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found[name] = document["components"]["schemas"][name]
                walk(found[name])
        for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(each)

    for method, path in operations(document):
        walk(document["paths"][path][method]["responses"])
    return found


def test_every_answer_has_its_type(document: dict[str, Any]) -> None:
    own, seen = own_of_the_model(), set()
    for name, schema in answers(document).items():
        if name.startswith("Video") or name == "CancelledVideo":
            schema = schema | {"properties": {k: v for k, v in schema["properties"].items() if k not in own}}
        kind = getattr(types, NAMES.get(name, name), None)
        assert kind is not None, f"cinemo.client.types lacks {name}"
        here = kind.model_json_schema()
        assert here["properties"].keys() == schema["properties"].keys(), name
        for field, there in schema["properties"].items():
            assert kinds(there) <= kinds(here["properties"][field]) | {"anything"}, f"{name}.{field}"
            if "null" not in kinds(there) and field in schema.get("required", ()):
                assert kinds(here["properties"][field]) - {"null"} == kinds(there), f"{name}.{field}"
        assert set(here.get("required", ())) <= set(schema.get("required", ())), (
            f"{name} may lack what is required here"
        )
        seen.add(kind)
    declared = {each for each in vars(types).values() if isinstance(each, type) and issubclass(each, types.Answer)}
    assert declared - seen <= {types.Answer, types.PromptTokens, types.Preview}


def test_the_statuses_are_the_servers(document: dict[str, Any]) -> None:
    there = document["components"]["schemas"]["Video"]["properties"]["status"]["enum"]
    assert set(there) == set(Status.__args__)  # type: ignore[attr-defined]
    assert set(FINAL) < set(there)
    events = document["paths"]["/v1/videos/{video_id}/events"]["get"]["responses"]["200"]["content"]
    assert {"progress", *FINAL} < set(events["text/event-stream"]["schema"]["properties"]["event"]["enum"])


def test_every_field_of_the_form_is_an_argument(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["VideoForm"]["properties"]
    shared = fields.keys() - own_of_the_model() - {"input_reference", "input_reference[image_url]"}
    written = {"string": "str | None", "number": "float | None", "boolean": "bool | None"}
    for client in (Client, AsyncClient):
        for method in (client.create, client.create_sync):
            arguments = inspect.signature(method).parameters
            named = arguments.keys() - {"self", "picture", "pictures", "idempotency_key", "controls"}
            assert named == shared, method
            for name in shared - {"prompt"}:
                assert arguments[name].annotation == written[fields[name]["type"]], name
            assert all(arguments[name].default is None for name in named - {"prompt"})


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type) -> dict[str, list[str]]:
        public = {name: each for name, each in inspect.getmembers(client, callable) if not name.startswith("_")}
        return {name: [str(each) for each in inspect.signature(method).parameters] for name, method in public.items()}

    assert methods(Client) == methods(AsyncClient)


# How each operation of the document is asked for.
CALLS: dict[tuple[str, str], Callable[[Client], Any]] = {
    ("post", "/v1/videos"): lambda client: client.create(b"", ""),
    ("get", "/v1/videos"): lambda client: next(iter(client.videos())),
    ("get", "/v1/videos/{video_id}"): lambda client: client.retrieve("id"),
    ("delete", "/v1/videos/{video_id}"): lambda client: client.delete("id"),
    ("post", "/v1/videos/{video_id}/cancel"): lambda client: client.cancel("id"),
    ("get", "/v1/videos/{video_id}/content"): lambda client: client.content("id"),
    ("get", "/v1/videos/{video_id}/events"): lambda client: client.wait("id", outage=0),
    ("get", "/v1/models"): lambda client: client.models(),
    ("get", "/v1/models/{model}"): lambda client: client.model("id"),
    ("post", "/v1/videos/{video_id}/remix"): lambda client: client.remix("id", ""),
    ("post", "/v1/videos/sync"): lambda client: client.create_sync(b"", ""),
    ("get", "/v1/videos/{video_id}/input"): lambda client: client.picture("id"),
}


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for path, each in document["paths"].items():
        if path.startswith("/v1/"):
            yield from ((method, path) for method in each)


def test_every_operation_can_be_asked_for(document: dict[str, Any]) -> None:
    """The client asks by the method, path and parameters that the document names."""
    found = list(operations(document))
    assert set(found) <= CALLS.keys()
    for method, path in found:
        asked: list[httpx.Request] = []

        def answer(request: httpx.Request, asked: list[httpx.Request] = asked) -> httpx.Response:
            asked.append(request)
            begun = request.url.path == "/v1/videos/id" and len(asked) == 1
            return httpx.Response(200 if begun else 400, json={"id": "id", "status": "queued"})

        transport = httpx.MockTransport(answer)
        with Client("http://there", transport=transport, max_retries=0) as client, suppress(VideoServerError):
            CALLS[method, path](client)
        named = [(each.method.lower(), each.url.path) for each in asked]
        assert (method, path.replace("{video_id}", "id").replace("{model}", "id")) in named
        known = {each["name"] for each in document["paths"][path][method].get("parameters", ())}
        assert {name for each in asked[-1:] for name in each.url.params} <= known
