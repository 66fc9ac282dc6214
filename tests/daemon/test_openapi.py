"""The OpenAPI document is served and true: right and wrong requests are answered as it says."""

import asyncio
import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from streamsyn.daemon.http_app import ROUTES
from streamsyn.daemon.openapi import document
from tests.daemon.conftest import Served

CHECKS = (not_a_server_error, status_code_conformance, response_schema_conformance)
ENDLESS = {"/v1/events"}
"""Streams that do not end by themselves."""


async def test_each_route_is_in_the_document(daemon: Served) -> None:
    """Served to everyone, with an operation for each route, under names that occur once."""
    served = await daemon.ask("GET", "/openapi.json")

    operations = [operation for path in served["paths"].values() for operation in path.values()]
    assert len(operations) == len(ROUTES)
    assert len({operation["operationId"] for operation in operations}) == len(ROUTES)
    assert served["openapi"].startswith("3.1")
    assert all(operation["summary"].endswith(".") for operation in operations)


@schemathesis.serializer("application/x-ndjson")
def ndjson(_context: Any, value: Any) -> bytes:
    """Any value as a line."""
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


def attack(url: str, number: int) -> list[str]:
    """Send each operation valid and invalid requests; what the answers have and the document does not."""
    found_wrong: list[str] = []
    schema = schemathesis.openapi.from_dict(document(ROUTES))
    schema.config.update(base_url=url)
    routes = {(route.method, route.path): route for route in ROUTES}
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if operation.path in ENDLESS:
            continue
        route = routes[operation.method.upper(), operation.path]
        has_model = isinstance(route.body, type)
        can_be_wrong = has_model or bool(route.query) or (route.body is None and "{id}" in route.path)
        for mode in [GenerationMode.POSITIVE, *[GenerationMode.NEGATIVE] * can_be_wrong]:

            @settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                case.query.pop("follow", None)  # such a stream ends with its run
                if "id" in case.path_parameters and len(case.path_parameters["id"]) % 2:
                    case.path_parameters["id"] = "first"
                case.call_and_validate(checks=CHECKS, timeout=10)

            try:
                send()
            except FailureGroup as failures:
                found_wrong += [f"{operation.label}: {failure}" for failure in failures.exceptions]
    return found_wrong


@pytest.mark.crash  # in the lanes of long tests
@pytest.mark.hypothesis
@pytest.mark.timeout(600)
async def test_schemathesis(daemon: Served) -> None:
    """No server error, no status and no body that the document does not have."""
    await daemon.new_run("first")
    number = {"long": 6, "torture": 100}.get(settings.get_current_profile_name(), 2)
    found_wrong = await asyncio.to_thread(attack, daemon.url, number)
    assert not found_wrong, "\n".join(found_wrong)
    assert (await daemon.ask("GET", "/healthz")) == {"status": "ok"}
