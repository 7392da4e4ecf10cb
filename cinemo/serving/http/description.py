"""The OpenAPI document: what FastAPI finds by itself, made complete where it cannot know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cinemo.bundle import BundleCard
from cinemo.config import Recipe
from cinemo.methods import method_class, served_controls
from cinemo.serving.http.access import SCHEME
from cinemo.serving.http.form import PICTURE, control_schema, form_schema
from cinemo.serving.http.schema import ErrorBody

_MEANINGS = {
    400: "not supported, or malformed; the message says which",
    401: "no valid API key",
    404: "unknown (or expired, or another key's)",
    408: "the body did not arrive in time",
    409: "there is no video (yet), or not its picture any more",
    413: "the body or the picture is too large",
    415: "not a form or JSON, or not a PNG, JPEG or WebP picture",
    416: "the range starts beyond the end",
    422: "a field has a wrong value, or the picture is damaged",
    429: "too many at once; Retry-After says when to come back",
    500: "a server error, which was logged",
    504: "the job missed its deadline",
    503: "the server cannot answer right now",
    507: "the server's disk is full; what is finished can still be deleted",
}


FILE = {"schema": {"type": "string", "format": "binary"}}

_PREVIEW = {
    "type": "object",
    "description": "of a job with previews=true, while it is made",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "video.preview"},
        "step": {"type": "integer", "description": "of the sampler, as in the video"},
        "frames": {"type": "array", "items": {"type": "string"}, "description": "data: URLs of small WebP pictures"},
    },
    "required": ["id", "object", "step", "frames"],
}

EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "the sampler's step, or the final status; a preview has none"},
        "event": {"enum": ["progress", "preview", "completed", "failed", "cancelled", "deleted"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [{"$ref": "#/components/schemas/Video"}, _PREVIEW]},
        },
    },
    "required": ["event", "data"],
}
"""One of the events of a stream."""


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers that are not a success, for a route's ``responses``."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


def describe(api: FastAPI, needs_key: bool, card: Callable[[], BundleCard]) -> dict[str, Any]:
    """The document, made once for each bundle that is served: its model's controls are part of it, and keys where they
    are needed."""
    served = card()
    if api.openapi_schema is None or api.openapi_schema["info"]["x-bundle"] != served.digest:
        made = get_openapi(
            title=api.title, version=api.version, routes=api.routes, webhooks=api.webhooks.routes, description=_ABOUT
        )
        made["info"]["x-bundle"] = served.digest
        _describe_bodies(made, served.recipe)
        _describe_video(made, served.recipe)
        for path, operations in made["paths"].items():
            for operation in operations.values():
                if not path.startswith("/v1/") or not needs_key:
                    operation["responses"].pop("401", None)
                elif needs_key:
                    operation["security"] = [{"key": []}]
                # FastAPI's own, where a path parameter is any text at all and nothing can be wrong with it.
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                for status in ("429", "503", "507"):
                    if status in operation["responses"]:
                        operation["responses"][status]["headers"] = {"Retry-After": _RETRY_AFTER}
        for hook in made.get("webhooks", {}).values():
            hook["post"]["responses"] = {"2XX": {"description": "received; everything else is tried again"}}
        if needs_key:
            made["components"]["securitySchemes"] = {"key": SCHEME}
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        api.openapi_schema = made
    return api.openapi_schema


_ABOUT = "Animates pictures: create a video, follow it (poll or events), download it. OpenAI's video API, extended."
_REFERENCE_URL = f"{PICTURE}[image_url]"
_RETRY_AFTER = {"description": "seconds", "schema": {"type": "integer"}}


def _describe_bodies(document: dict[str, Any], recipe: Recipe) -> None:
    """The bodies that are read without FastAPI: forms, which have absent fields and no nulls, and JSON objects."""
    pictures = [name for name, each in method_class(recipe).inputs.items() if each.kind == "image"]
    encoding = {name: {"contentType": "image/png, image/jpeg, image/webp"} for name in (PICTURE, *pictures)}
    form = form_schema(recipe)
    for name, field in form["properties"].items():
        kinds = [kind for kind in field.pop("anyOf", []) if kind.get("type") != "null"]
        form["properties"][name] = field | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
    fields = {name: _as_json(field) for name, field in form["properties"].items() if name != _REFERENCE_URL}
    url = {"type": "string", "description": "data:, or http(s): where enabled"}
    reference = {"type": "object", "properties": {"image_url": url}, "required": ["image_url"]}
    fields[PICTURE] = {"description": "picture to animate", "anyOf": [url, reference]}
    schemas = document["components"]["schemas"]
    schemas["VideoForm"] = form | {"anyOf": [{"required": [PICTURE]}, {"required": [_REFERENCE_URL]}]}
    schemas["VideoJson"] = {
        "type": "object",
        "properties": fields,
        "required": [*form["required"], PICTURE],
        "additionalProperties": False,
    }
    schemas["RemixJson"] = {
        "type": "object",
        "properties": {name: field for name, field in fields.items() if name not in encoding},
        "required": ["prompt"],
        "additionalProperties": False,
    }
    whole = {
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/VideoForm"}, "encoding": encoding},
        "application/json": {"schema": {"$ref": "#/components/schemas/VideoJson"}},
    }
    changed = {"application/json": {"schema": {"$ref": "#/components/schemas/RemixJson"}}}
    for path, content in (
        ("/v1/videos", whole),
        ("/v1/videos/sync", whole),
        ("/v1/videos/{video_id}/remix", changed),
    ):
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}


def _as_json(field: dict[str, Any]) -> dict[str, Any]:
    """A form's field in a JSON body, where a picture is a URL."""
    if field.get("format") != "binary":
        return field
    return {
        "type": "string",
        "description": f"URL of a picture (data:, or http(s): where enabled): {field['description']}",
    }


def _describe_video(document: dict[str, Any], recipe: Recipe) -> None:
    """A video has the settings of the model that made it; here are those of the one that is served."""
    controls = method_class(recipe).controls_type
    settings = controls().settings(recipe)
    own = {
        info.alias: control_schema(controls, name) for name, info in served_controls(recipe).items() if name in settings
    }
    names = {
        "type": "array",
        "items": {"type": "string"},
        "description": "pictures that came beside the one to animate",
    }
    for name in ("Video", "CancelledVideo"):
        document["components"]["schemas"][name]["properties"] |= own | {"inputs": names}
