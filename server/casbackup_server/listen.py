"""Addresses to listen on."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from casbackup.errors import UsageError


class Listen(NamedTuple):
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Can only this machine reach it?"""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Is it this machine, under a name or an address (of version 6 in brackets) that only this machine has?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_listen(text: str) -> Listen:
    """:raise UsageError: when it is not ADDRESS:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text!r} is not an address to listen on: it must look like 127.0.0.1:8007 or [::]:8007")
    return Listen(host, int(port))
