"""The OpenAPI document: what the routes take and how they fail.

Routes read raw bodies, so that megabytes are parsed off the event loop; the framework knows nothing of these. Here each path is told its model.
"""

from __future__ import annotations

import re
from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from zen_turbo.server.completions import CompletionRequest
from zen_turbo.server.files import MAX_LISTED, PURPOSES
from zen_turbo.server.responses import ResponsesRequest
from zen_turbo.server.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[pydantic.BaseModel]] = {
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/chat/completions/input_tokens": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}
_PURPOSE = {"type": "string", "enum": list(PURPOSES)}
FORMS: dict[str, dict[str, Any]] = {
    "/v1/files": {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": _PURPOSE},
    },
}
_QUERIES: dict[str, dict[str, Any]] = {
    "/v1/files": {
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED},
        "order": {"enum": ["asc", "desc"]},
        "after": {"type": "string"},
        "purpose": {"type": "string"},
    },
}
_STREAMED = ("application/json", "text/event-stream")
# What a success is, where it is not only JSON.
_MEDIA_TYPES: dict[str, tuple[str, ...]] = {
    "/metrics": ("text/plain",),
    "/v1/files/{file_id}/content": ("application/octet-stream",),
    "/v1/chat/completions": _STREAMED,
    "/v1/completions": _STREAMED,
    "/v1/responses": _STREAMED,
}
_REFERENCE = "#/components/schemas/{model}"
_METHODS = frozenset({"get", "put", "post", "delete", "patch"})
_ERROR_BODY = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "unavailable_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ERROR = {
    "description": "Any failure, with the status of its code (docs/errors.md).",
    "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}},
}


def install(app: FastAPI) -> None:
    """Make ``app.openapi()`` and /openapi.json say what is true."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = _ERROR_BODY
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]  # a server may ask for none
    for path, item in document["paths"].items():
        for method in item.keys() & _METHODS:
            operation = item[method]
            operation["responses"]["default"] = _ERROR
            if path in _MEDIA_TYPES:
                operation["responses"]["200"]["content"] = {media_type: {"schema": {}} for media_type in _MEDIA_TYPES[path]}
            if method == "post" and path in BODIES:
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(BODIES[path], schemas)}}}
            if method == "post" and path in FORMS:
                operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": FORMS[path]}}}
            operation["parameters"] = [
                *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"{(\w+)", path)),
                *({"name": name, "in": "query", "schema": schema} for name, schema in _QUERIES.get(path, {}).items() if method == "get"),
            ]
    return document


def _schema(model: type[pydantic.BaseModel], schemas: dict[str, Any]) -> dict[str, str]:
    """A reference to the model's schema, which goes to the document's components with all that it needs."""
    schema = model.model_json_schema(ref_template=_REFERENCE)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    return {"$ref": _REFERENCE.format(model=model.__name__)}
