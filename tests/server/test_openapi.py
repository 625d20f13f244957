"""The description of the interface, and schemathesis' attempts to break what it describes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks

from casbackup_server.rights import Right

from .conftest import Running, committed, grant, serving, token_gate

load_all_checks()
_CHECKS = CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[Running]:
    with serving(folder, token_gate) as server:
        committed(server.local(), b"x" * 4096)
        yield server


def _try(server: Running, examples: int) -> None:
    """Every operation, ``examples`` times, with a token that may do everything."""
    headers = {"Authorization": f"Bearer {grant(server.folder, Right.ADMIN)}"}
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/v1/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @schemathesis_given(operation)
        def one(case: Any) -> None:
            case.path_parameters = {**(case.path_parameters or {}), "repository": "main"}
            case.call_and_validate(headers=headers, checks=_CHECKS)

        one()


def schemathesis_given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())


def test_a_few_attempts(tmp_path: Path) -> None:
    with _served(tmp_path / "repository") as server:
        _try(server, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_attempts(tmp_path: Path) -> None:
    with _served(tmp_path / "repository") as server:
        _try(server, 300)


def test_every_operation_has_a_summary_and_limits(running: Running) -> None:
    import urllib3

    described = json.loads(urllib3.request("GET", f"http://127.0.0.1:{running.port}/v1/openapi.json").data)
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description"), (method, path)
            assert {"400", "401", "403", "404", "413", "422", "429"} <= set(operation["responses"]), path
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schema = content["schema"]
                assert "$ref" in schema or "maxLength" in schema, path
