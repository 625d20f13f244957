"""NBD URIs (doc/uri.md of https://github.com/NetworkBlockDevice/nbd)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from casbackup.block.nbd.protocol import DEFAULT_PORT, MAX_EXPORT_NAME_BYTES
from casbackup.errors import UsageError

_TLS_SCHEMES = ("nbds", "nbds+unix", "nbds+vsock")
SCHEMES = ("nbd", "nbd+unix", *_TLS_SCHEMES, "nbd+vsock")
"""Everything that is an NBD URI, whether it is supported or not."""

MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` holds 108 bytes with the final zero (unix(7))."""


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where a server listens, and the export wanted of it. Its ``str`` is the URI."""

    export: str = ""
    socket_path: str | None = None
    host: str = "localhost"
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        export = quote(self.export, safe="")
        if self.socket_path is not None:
            return f"nbd+unix:///{export}?socket={quote(self.socket_path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{export}"


def is_nbd_uri(text: str) -> bool:
    """Whether ``text`` begins like a URI of one of the NBD schemes."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def parse_uri(text: str) -> NbdAddress:
    """``nbd://HOST[:PORT]/EXPORT`` or ``nbd+unix:///EXPORT?socket=PATH``.

    :raise UsageError: for anything else; TLS and vsock are said not to be supported yet.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError as error:
        raise UsageError(f"{text!r} is not a valid NBD URI: {error}") from error
    _check_scheme(parts.scheme, query, text)
    export = _export(parts.path, text)
    if parts.scheme == "nbd":
        _reject_unknown(query, (), text)
        return NbdAddress(export=export, host=parts.hostname or "localhost", port=port or DEFAULT_PORT)
    if parts.netloc:
        raise UsageError(f"{text!r}: nbd+unix takes no host; write nbd+unix:///EXPORT?socket=PATH")
    return NbdAddress(export=export, socket_path=_socket_path(query, text))


def _check_scheme(scheme: str, query: dict[str, list[str]], text: str) -> None:
    if scheme in _TLS_SCHEMES or any(name.startswith("tls-") for name in query):
        raise UsageError(f"{text!r}: NBD over TLS is not supported yet; use a tunnel, or a unix socket")
    if scheme not in ("nbd", "nbd+unix"):
        raise UsageError(f"{text!r}: only nbd:// and nbd+unix:// URIs are supported")


def _export(path: str, text: str) -> str:
    name = unquote(path.removeprefix("/"))
    if "\0" in name or len(name.encode("utf-8", "surrogateescape")) > MAX_EXPORT_NAME_BYTES:
        raise UsageError(f"{text!r}: not a valid name of an export")
    return name


def _socket_path(query: dict[str, list[str]], text: str) -> str:
    _reject_unknown(query, ("socket",), text)
    paths = query.get("socket", [])
    if len(paths) != 1:
        raise UsageError(f"{text!r} must name one socket: nbd+unix:///EXPORT?socket=PATH")
    if len(paths[0].encode("utf-8", "surrogateescape")) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(f"{text!r}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
    return paths[0]


def _reject_unknown(query: dict[str, list[str]], known: tuple[str, ...], text: str) -> None:
    for name in query:
        if name not in known:
            raise UsageError(f"{text!r}: unknown parameter {name!r}")
