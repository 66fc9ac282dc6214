"""The OpenAPI 3.1 document of the daemon, made from the routes; and `/openapi.json`, which serves it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Final

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import streamsyn
from streamsyn.daemon.problems import OPENAI_PATHS, title_of
from streamsyn.daemon.route import ID, PROBLEM, Body, Route, json_response

_VARIABLE: Final = re.compile(r"\{(\w+)\}")
_TYPES: Final = {str: "string", int: "integer", bool: "boolean"}
_JSON: Final = "application/json"
References = Mapping[type[BaseModel], Mapping[str, Any]]
_PROBLEM_SCHEMA: Final = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}
_OPENAI_SCHEMA: Final = {
    "type": "object",
    "description": "An error as OpenAI's clients read it.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_FORM: Final = "multipart/form-data"
_FORM_SCHEMA: Final = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
    "additionalProperties": False,
}
"""What an upload to `/v1/files` is, the only form there is."""


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the OpenAPI document of some routes."""
    routes = list(routes)
    bodies = [body for route in routes for body in (route.body, *route.answers.values())]
    models = dict.fromkeys(body for body in bodies if isinstance(body, type))
    found, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    references = {model: reference for (model, _), reference in found.items() if issubclass(model, BaseModel)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "streamsyn",
            "version": streamsyn.__version__,
            "description": "Long contexts for short instruction-answer pairs: runs over one fleet.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {
                **schemas.get("$defs", {}),
                "Problem": _PROBLEM_SCHEMA,
                "OpenAIError": _OPENAI_SCHEMA,
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, references: References) -> dict[str, Any]:
    statuses = {*route.problems, 401, 403, 421, 429} | ({503} if route.method != "GET" else set())
    if _VARIABLE.search(route.path):
        statuses |= {404}
    if route.query:
        statuses |= {400, 422}
    if route.body is not None:
        statuses |= {400, 408, 413, 415, 422}
    statuses -= set(route.answers)
    operation: dict[str, Any] = {
        "operationId": route.operation_id,
        "summary": route.summary,
        "parameters": list(_parameters(route)),
        "responses": {
            **{str(status): _answer(status, body, references) for status, body in route.answers.items()},
            **{str(status): _problem(status, route.path) for status in sorted(statuses)},
        },
    }
    if route.body is not None:
        operation["requestBody"] = {
            "content": _content(route.body, references),
            "required": route.body_is_required,
        }
    if route.scope != "open":
        operation["security"] = [{"token": [route.scope]}, {}]
    return operation


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in _VARIABLE.findall(route.path):
        schema = {
            "type": "string",
            "minLength": 1,
            **({"pattern": f"^{ID.pattern}$"} if name == "id" else {}),
        }
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    for name, kind in route.query.items():
        yield {"name": name, "in": "query", "required": False, "schema": {"type": _TYPES[kind]}}
    for name in route.headers:
        yield {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}


def _answer(status: int, body: Body, references: References) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": title_of(status)}
    if body is not None:
        answer["content"] = _content(body, references)
    return answer


def _problem(status: int, path: str) -> dict[str, Any]:
    if path.startswith(OPENAI_PATHS):
        content = {_JSON: {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
    else:
        content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": title_of(status), "content": content}


def _content(body: type[BaseModel] | str, references: References) -> dict[str, Any]:
    if isinstance(body, str):
        return {
            media_type.strip(): {"schema": _FORM_SCHEMA} if media_type == _FORM else {}
            for media_type in body.split(",")
        }
    return {_JSON: {"schema": references[body]}}


def openapi_route(routes: Iterable[Route]) -> Route:
    """Return the route that serves the document of `routes`, itself included."""

    @cache
    def content() -> dict[str, Any]:
        return document([*routes, route])

    async def openapi(_request: web.Request) -> web.Response:
        """Return the OpenAPI document."""
        return json_response(content())

    route = Route(
        method="GET",
        path="/openapi.json",
        handler=openapi,
        scope="open",
        summary="This document.",
        answers={200: "application/json"},
    )
    return route
