"""NBD URIs (doc/uri.md of https://github.com/NetworkBlockDevice/nbd)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from casbackup.block.nbd.protocol import DEFAULT_PORT, MAX_EXPORT_NAME_BYTES
from casbackup.errors import UsageError

_TCP_SCHEMES = ("nbd", "nbds")
_UNIX_SCHEMES = ("nbd+unix", "nbds+unix")
_TLS_SCHEMES = ("nbds", "nbds+unix")
SCHEMES = (*_TCP_SCHEMES, *_UNIX_SCHEMES, "nbd+vsock", "nbds+vsock")
"""Everything that is an NBD URI, whether it is supported or not."""

MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` holds 108 bytes with the final zero (unix(7))."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client wants to be secured."""

    folder: str | None = None
    """Holds ``ca-cert.pem``, and perhaps ``client-cert.pem`` and ``client-key.pem``; None: the system's CAs."""
    hostname: str | None = None
    """Whom the server's certificate must name; None: the host that is connected to."""
    verify: bool = True
    """Whether the server's certificate is checked at all."""


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where a server listens, and the export wanted of it. Its ``str`` is the URI."""

    export: str = ""
    socket_path: str | None = None
    host: str = "localhost"
    port: int = DEFAULT_PORT
    tls: ClientTls | None = None
    """None: no TLS."""

    def __str__(self) -> str:
        export = quote(self.export, safe="")
        scheme = "nbd" if self.tls is None else "nbds"
        query = [] if self.tls is None else _tls_query(self.tls)
        if self.socket_path is not None:
            query.insert(0, f"socket={quote(self.socket_path)}")
            start = f"{scheme}+unix:///{export}"
        else:
            host = f"[{self.host}]" if ":" in self.host else self.host
            start = f"{scheme}://{host}:{self.port}/{export}"
        return "?".join(filter(None, (start, "&".join(query))))


def is_nbd_uri(text: str) -> bool:
    """Whether ``text`` begins like a URI of one of the NBD schemes."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def parse_uri(text: str) -> NbdAddress:
    """``nbd://HOST[:PORT]/EXPORT`` or ``nbd+unix:///EXPORT?socket=PATH``; with TLS ``nbds`` for ``nbd``.

    Parameters with TLS: ``tls-certificates=FOLDER``, ``tls-hostname=NAME``, ``tls-verify-peer=false``.

    :raise UsageError: for anything else.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError as error:
        raise UsageError(f"{text!r} is not a valid NBD URI: {error}") from error
    scheme = parts.scheme
    if scheme not in (*_TCP_SCHEMES, *_UNIX_SCHEMES):
        raise UsageError(f"{text!r}: only nbd:// and nbd+unix:// URIs are supported, and nbds for TLS")
    export = _export(parts.path, text)
    tls = _tls(query, text) if scheme in _TLS_SCHEMES else None
    if scheme in _TCP_SCHEMES:
        _reject_unknown(query, text)
        return NbdAddress(export=export, host=parts.hostname or "localhost", port=port or DEFAULT_PORT, tls=tls)
    if parts.netloc:
        raise UsageError(f"{text!r}: {scheme} takes no host; write {scheme}:///EXPORT?socket=PATH")
    return NbdAddress(export=export, socket_path=_socket_path(query, text), tls=tls)


def _export(path: str, text: str) -> str:
    name = unquote(path.removeprefix("/"))
    if "\0" in name or len(name.encode("utf-8", "surrogateescape")) > MAX_EXPORT_NAME_BYTES:
        raise UsageError(f"{text!r}: not a valid name of an export")
    return name


def _socket_path(query: dict[str, list[str]], text: str) -> str:
    paths = query.pop("socket", [])
    _reject_unknown(query, text)
    if len(paths) != 1:
        raise UsageError(f"{text!r} must name one socket: nbd+unix:///EXPORT?socket=PATH")
    if len(paths[0].encode("utf-8", "surrogateescape")) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(f"{text!r}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
    return paths[0]


def _tls(query: dict[str, list[str]], text: str) -> ClientTls:
    """Takes the parameters of TLS out of ``query``."""
    verify = query.pop("tls-verify-peer", ["true"])[-1]
    if verify not in ("true", "false"):
        raise UsageError(f"{text!r}: tls-verify-peer must be true or false")
    folder = query.pop("tls-certificates", [None])[-1]
    hostname = query.pop("tls-hostname", [None])[-1]
    return ClientTls(folder, hostname, verify == "true")


def _tls_query(tls: ClientTls) -> list[str]:
    values = {"tls-certificates": tls.folder, "tls-hostname": tls.hostname}
    query = [f"{name}={quote(value)}" for name, value in values.items() if value is not None]
    return query if tls.verify else [*query, "tls-verify-peer=false"]


def _reject_unknown(query: dict[str, list[str]], text: str) -> None:
    for name in query:
        raise UsageError(f"{text!r}: unknown parameter {name!r}")
