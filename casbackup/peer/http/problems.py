"""The answer of a server that failed, as the error that the same failure would be here."""

from __future__ import annotations

import json

from casbackup.errors import (
    CasbackupError,
    RequestRefused,
    RightMissing,
    ServerBusy,
    ServerFault,
    ServerProtocolError,
    TokenInvalid,
    catalogue,
)

_BY_STATUS: dict[int, type[CasbackupError]] = {
    401: TokenInvalid,
    403: RightMissing,
    408: RequestRefused,
    413: RequestRefused,
    429: ServerBusy,
    502: ServerBusy,
    503: ServerBusy,
    504: ServerBusy,
}
_LONGEST = 4096


def failure_of(status: int, body: bytes) -> CasbackupError:
    """The error in a problem document (RFC 9457); without one, what the status says."""
    code, detail = _document(body)
    # A class without a code of its own only words another one.
    known = {error.code: error for error in catalogue() if "code" in vars(error)}
    if code in known:
        return known[code](detail)
    kind = _BY_STATUS.get(status, ServerFault if status >= 500 else ServerProtocolError)
    return kind(detail or f"the server answered with status {status}")


def _document(body: bytes) -> tuple[str, str]:
    """Code and detail."""
    try:
        content = json.loads(body)
        code, detail = content["code"], content["detail"]
    except (ValueError, TypeError, KeyError):
        return "", ""
    if not isinstance(code, str) or not isinstance(detail, str):
        return "", ""
    return code, detail[:_LONGEST]
