"""Why a server cannot be reached, in words that help."""

from __future__ import annotations

import http.client
import ssl

from urllib3.exceptions import HTTPError, NameResolutionError, ReadTimeoutError, SSLError

from casbackup.errors import CasbackupError, CertificateUntrusted, ServerUnreachable


def not_reached(server: str, error: Exception, *, has_answered: bool) -> CasbackupError:
    """The error for one of urllib3's; ``final`` in its ``__dict__`` if trying again is of no use.

    ``server``: its scheme, host and port. ``has_answered``: earlier, so that it is what it seems to be.
    """
    cause = _innermost(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return CertificateUntrusted(f"the certificate of {server} is not trusted: {cause.verify_message}")
    hint = "" if has_answered else _hint(server, cause)
    failure = ServerUnreachable(f"{server} cannot be reached: {_words(cause)}{hint}")
    if isinstance(error, NameResolutionError | ReadTimeoutError) or (
        isinstance(error, SSLError) and not _is_broken(cause, has_answered=has_answered)
    ):
        failure.__dict__["final"] = True
    return failure


def _is_broken(cause: BaseException, *, has_answered: bool) -> bool:
    """Did TLS fail because the connection broke, as it does when a server is restarted?"""
    return has_answered or isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError)


def _innermost(error: BaseException) -> BaseException:
    """The cause, without the objects that urllib3 puts around it."""
    while True:
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, HTTPError | OSError):
            return error
        error = inner


def _hint(server: str, cause: BaseException) -> str:
    if server.startswith("http://") and isinstance(cause, http.client.RemoteDisconnected | ConnectionResetError):
        return "; it may want https://"
    if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
        return "; it may want http://"
    return ""


def _words(cause: BaseException) -> str:
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed: {(cause.reason or str(cause)).replace('_', ' ').lower()}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause).rpartition(": ")[2] or type(cause).__name__
