"""``https://host:port/NAME``: where a repository is on a server."""

from __future__ import annotations

import re
from typing import NamedTuple

from casbackup.errors import InvalidName, UsageError

_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[^/:?#@\s\[\]]+)(?::(?P<port>[0-9]{1,5}))?/(?P<name>[^?#\s]*)"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Address(NamedTuple):
    """A repository on a server."""

    scheme: str
    host: str
    port: int
    repository: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/{self.repository}"


def is_address(text: str) -> bool:
    """Does it name a server rather than a folder?"""
    return text.startswith(("http://", "https://"))


def parse_address(text: str) -> Address:
    """:raise UsageError: when it is not ``http[s]://HOST[:PORT]/NAME``."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not the address of a repository: it must look like https://host:8007/NAME")
    name = parse_repository_name(match["name"].rstrip("/"))
    port = int(match["port"] or _DEFAULT_PORTS[match["scheme"]])
    if not 0 < port < 65536:
        raise UsageError(f"{text!r} has no valid port")
    return Address(match["scheme"], match["host"], port, name)


def parse_repository_name(text: str) -> str:
    """The name of a repository on a server.

    :raise InvalidName: for anything that is not a name of one component.
    """
    if not _NAME.fullmatch(text):
        raise InvalidName(f"repository {text!r} is not a valid name")
    return text
