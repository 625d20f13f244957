"""TLS for NBD: certificates in a folder, as QEMU, nbdkit and libnbd take them, and a wire that uses it."""

from __future__ import annotations

import math
import os
import ssl

from casbackup.block.nbd.uri import ClientTls
from casbackup.block.nbd.wire import Wire
from casbackup.errors import NbdConnectionFailed, UsageError
from casbackup.units import KiB

_RECORD_BYTES = 16 * KiB
"""The most that TLS sends at a time."""

_CA = "ca-cert.pem"
_SERVER = ("server-cert.pem", "server-key.pem")
_CLIENT = ("client-cert.pem", "client-key.pem")


class TlsWire(Wire):
    """A wire whose socket knows neither flags nor the kernel's timeouts."""

    def _apply_timeout(self, timeout_s: float | None) -> None:
        self._socket.settimeout(timeout_s)

    def _read(self, view: memoryview) -> int:
        try:
            return self._socket.recv_into(view)
        except TimeoutError as error:
            raise BlockingIOError from error

    def _write(self, buffers: list[memoryview]) -> int:
        """A header and its small payload go out as one record."""
        together = len(buffers) > 1 and sum(map(len, buffers)) <= _RECORD_BYTES
        try:
            return self._socket.send(b"".join(buffers) if together else buffers[0])
        except TimeoutError as error:
            raise BlockingIOError from error


def secure_client(wire: Wire, tls: ClientTls, host: str) -> Wire:
    """The connection with TLS, in place of ``wire``, which is closed if that fails.

    :raise UsageError: when the certificates cannot be used.
    :raise NbdConnectionFailed: when the peers do not come to terms.
    """
    context = _client_context(tls)
    return _secured(wire, context, hostname=tls.hostname or host)


def secure_server(wire: Wire, context: ssl.SSLContext) -> Wire:
    """As ``secure_client``, for the other side."""
    return _secured(wire, context, hostname=None)


def server_context(folder: str, *, verify_clients: bool = False) -> ssl.SSLContext:
    """The server's certificates: ``server-cert.pem`` and ``server-key.pem``.

    ``verify_clients``: a client must have a certificate that the folder's ``ca-cert.pem`` has signed.

    :raise UsageError: when a file is missing or of no use.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_identity(context, folder, _SERVER)
    if verify_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authority(context, folder)
    return context


def _client_context(tls: ClientTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.folder is None:
        context.load_default_certs()
    else:
        _load_authority(context, tls.folder)
    if tls.folder is not None and os.path.exists(os.path.join(tls.folder, _CLIENT[0])):
        _load_identity(context, tls.folder, _CLIENT)
    return context


def _load_identity(context: ssl.SSLContext, folder: str, names: tuple[str, str]) -> None:
    certificate, key = (os.path.join(folder, name) for name in names)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise UsageError(f"{certificate} and {key} cannot be used: {_reason(error)}") from error


def _load_authority(context: ssl.SSLContext, folder: str) -> None:
    path = os.path.join(folder, _CA)
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be used: {_reason(error)}") from error


def _no_password() -> str:
    """Without this, OpenSSL would ask at the terminal."""
    raise ValueError("the key is encrypted")


def _secured(wire: Wire, context: ssl.SSLContext, *, hostname: str | None) -> Wire:
    stream = wire.detach()
    stream.settimeout(None if math.isinf(wire.timeout_s) else wire.timeout_s)
    try:
        secured = context.wrap_socket(stream, server_side=hostname is None, server_hostname=hostname)
    except (OSError, ValueError) as error:
        stream.close()
        raise NbdConnectionFailed(f"{wire.peer}: no TLS: {_reason(error)}") from error
    return TlsWire(secured, wire.peer, wire.timeout_s)


def _reason(error: Exception) -> str:
    """What went wrong; OpenSSL's errors have a ``strerror`` that is of no use."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
