"""What is tried again of what can go wrong on the way to a server."""

from __future__ import annotations

import socket
import ssl

import pytest
import urllib3
from urllib3.exceptions import NewConnectionError, ProtocolError, SSLError

from casbackup.errors import CertificateUntrusted, ServerUnreachable
from casbackup.peer.http.unreachable import not_reached

SERVER = "https://backup.example:8460"


def tls(cause: ssl.SSLError, reason: str | None = None) -> SSLError:
    cause.reason = reason  # type: ignore[assignment]  # as the ssl module sets it
    error = SSLError(cause)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "has_answered", "final"),
    [
        pytest.param(tls(ssl.SSLEOFError(8, "EOF occurred")), True, False, id="cut while it served"),
        pytest.param(tls(ssl.SSLEOFError(8, "EOF occurred")), False, False, id="cut while it started"),
        pytest.param(tls(ssl.SSLZeroReturnError(6, "closed")), True, False, id="closed in good order"),
        pytest.param(tls(ssl.SSLError(1, "bad record mac")), True, False, id="garbled on the way"),
        pytest.param(tls(ssl.SSLError(1, "wrong version"), "WRONG_VERSION_NUMBER"), False, True, id="no TLS there"),
        pytest.param(ProtocolError("aborted", ConnectionResetError(104, "reset")), True, False, id="reset"),
        pytest.param(
            NewConnectionError(urllib3.connection.HTTPConnection("h"), "refused"), False, False, id="nobody there"
        ),
    ],
)
def test_a_broken_connection_is_tried_again(error: Exception, has_answered: bool, final: bool) -> None:
    failure = not_reached(SERVER, error, has_answered=has_answered)
    assert isinstance(failure, ServerUnreachable)
    assert ("final" in failure.__dict__) == final


@pytest.mark.parametrize("has_answered", [False, True])
def test_a_certificate_that_is_not_trusted_is_not_tried_again(has_answered: bool) -> None:
    cause = ssl.SSLCertVerificationError(1, "certificate verify failed")
    cause.verify_message = "self-signed certificate"
    assert isinstance(not_reached(SERVER, tls(cause), has_answered=has_answered), CertificateUntrusted)


def test_a_tls_connection_that_breaks_really_looks_like_that() -> None:
    """What Python raises when the other end goes away in the middle of a handshake."""
    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises((ssl.SSLEOFError, ConnectionError)):
        ssl.create_default_context().wrap_socket(near, server_hostname="backup.example")
