"""Failures as problem documents (RFC 9457), with the code that the same failure has on the command line."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from casbackup import errors as e
from casbackup.spec.wire import PROBLEM

_STATUS: dict[type[e.CasbackupError], int] = {
    e.CasbackupError: 500,
    e.UsageError: 400,
    e.RepositoryNotFound: 404,
    e.RepositoryReadOnly: 409,
    e.RepositoryBusy: 409,
    e.RepositoryFull: 507,
    e.IndexFull: 507,
    e.SessionNotFound: 404,
    e.SessionBusy: 409,
    e.SessionDetached: 410,
    e.ClosureViolation: 409,
    e.CommitOutdated: 409,
    e.DiskSealed: 409,
    e.ClockSkewed: 400,
    e.SnapshotNotFound: 404,
    e.SnapshotAmbiguous: 409,
    e.SnapshotPinned: 409,
    e.SnapshotConflict: 409,
    e.KeyMissing: 404,
    e.KeyMismatch: 409,
    e.KeyExists: 409,
    e.KeyFileDamaged: 400,
    e.ArchiveError: 400,
    e.ServerBusy: 503,
    e.ServerUnreachable: 503,
    e.ServerJobNotFound: 404,
    e.ServerProtocolError: 400,
    e.RequestRefused: 413,
    e.TokenMissing: 401,
    e.TokenInvalid: 401,
    e.RightMissing: 403,
}
"""The status of a failure is that of the nearest class above it in the table."""


class Problem(BaseModel):
    """Why a request failed. ``code`` is stable and the same as in the command's ``--json``."""

    type: str = Field(examples=["urn:casbackup:error:snapshot-not-found"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["there is no snapshot of vm/100 in namespace default"])
    code: str = Field(examples=["snapshot-not-found"])
    retryable: bool = Field(examples=[False])


class Refusal(e.CasbackupError):
    """A failure that has another status here than its class has elsewhere."""

    def __init__(self, status: int, failure: e.CasbackupError) -> None:
        super().__init__(str(failure))
        self.status = status
        self.failure = failure


def status_of(failure: e.CasbackupError) -> int:
    return next(_STATUS[kind] for kind in type(failure).__mro__ if kind in _STATUS)


def problem(failure: e.CasbackupError, *, headers: dict[str, str] | None = None) -> Response:
    """The answer that says so."""
    status = status_of(failure)
    if isinstance(failure, Refusal):
        status, failure = failure.status, failure.failure
    return Response(
        problem_body(status, failure), status, media_type=PROBLEM, headers={**_headers(status), **(headers or {})}
    )


def problem_body(status: int, failure: e.CasbackupError) -> bytes:
    content = {
        "type": f"urn:casbackup:error:{failure.code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": str(failure),
        "code": failure.code,
        "retryable": failure.retryable,
    }
    return json.dumps(content).encode()


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of an operation that may end with these statuses, besides those that all may."""
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {PROBLEM: {"schema": _REFERENCE}}}
        for status in sorted({400, 401, 403, 404, 413, 422, 429, 503, *statuses})
    }


_REFERENCE = {"$ref": "#/components/schemas/Problem"}


def install(app: FastAPI) -> None:
    """Every failure of a request ends as a problem document."""

    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, e.CasbackupError)
        return problem(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem(Refusal(422, e.UsageError(_first(error))))

    async def of_framework(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        failure = e.ServerProtocolError(f"the request was not understood: {error.detail}")
        return problem(Refusal(error.status_code, failure), headers=dict(error.headers or {}))

    app.add_exception_handler(e.CasbackupError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_framework)


def _first(error: RequestValidationError) -> str:
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}"


def _headers(status: int) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": 'Basic realm="casbackup", Bearer realm="casbackup"'}
    return {"Retry-After": "1"} if status in (429, 503) else {}
