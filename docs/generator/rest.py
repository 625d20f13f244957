"""docs/reference/rest.md from the server's OpenAPI."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from casbackup_server.app import create_app
from casbackup_server.audit import Audit
from casbackup_server.budget import ByteBudget
from casbackup_server.gate import OpenGate
from casbackup_server.served import Server
from casbackup_server.threads import Threads

_INTRODUCTION = """
# REST

What `casbackup serve` answers. The server itself describes it as OpenAPI at `/v1/openapi.json`. Binary bodies are
described in [the wire format](../spec/wire.md); the rights that a request needs, in [tokens](../how-to/tokens.md).

A token is shown as `Authorization: Bearer TOKEN`, or as the password of HTTP Basic with any user. Every failure is a
problem document (RFC 9457, `application/problem+json`) whose `code` is one of [the errors](errors.md).
"""


def page() -> str:
    """The page, one section for each operation in the order in which the server has them."""
    server = Server({}, OpenGate(), Audit(), Threads(), ByteBudget(1))
    described = create_app(server).openapi()
    parts = [_INTRODUCTION.strip()]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            parts += _operation(f"{method.upper()} {path}", operation, described)
    parts += ["## Documents"]
    for name, schema in sorted(described["components"]["schemas"].items()):
        if not name.endswith("ValidationError"):
            parts += _schema(name, schema)
    return "\n\n".join(parts) + "\n"


def _operation(title: str, operation: dict[str, Any], described: dict[str, Any]) -> Iterator[str]:
    yield f"## {title}"
    yield operation["description"]
    rows = [
        (f"`{p['name']}`", p["in"] + ("" if p.get("required") else ", may be absent"), p.get("description", ""))
        for p in operation.get("parameters", [])
        if p["in"] != "path"
    ]
    if rows:
        yield _table(("parameter", "where", "meaning"), rows)
    body = operation.get("requestBody")
    if body is not None:
        yield f"Body: {_content(body)}"
    answers = [(status, answer) for status, answer in operation["responses"].items() if status < "300"]
    yield "\n".join(f"Answer {status}: {_content(answer)}" for status, answer in answers)
    failures = [status for status in sorted(operation["responses"]) if status >= "400"]
    yield "Failures: " + ", ".join(f"{status} {HTTPStatus(int(status)).phrase}" for status in failures) + "."


def _content(body: dict[str, Any]) -> str:
    """What a body holds, in a line."""
    for kind, content in body.get("content", {}).items():
        schema = content["schema"]
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return f"`{kind}`, [{name}](#{name.lower()})"
        longest = f", at most {schema['maxLength']:,} bytes" if "maxLength" in schema else ""
        return f"`{kind}`{longest}: {body['description']}"
    return "nothing."


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    if "description" in schema:
        yield schema["description"].replace("``", "`")
    required = schema.get("required", [])
    rows = [
        (f"`{key}`", _type(value) + ("" if key in required else ", may be absent"), value.get("description", ""))
        for key, value in schema.get("properties", {}).items()
    ]
    yield _table(("key", "type", "meaning"), rows)


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in lines
    )
