"""Typed ids and names. Raw bytes and unchecked strings stop at the edge; inside, these types are used."""

from __future__ import annotations

import os
import re
from typing import NewType

from casbackup.errors import InvalidName

BlobId = NewType("BlobId", bytes)
"""32-byte keyed BLAKE3 of a blob's plain bytes; the key differs per kind (chunk, node, config)."""

PackId = NewType("PackId", str)
"""32 random lower-case hex digits; the file name of a pack without ``.pack``."""

SessionId = NewType("SessionId", str)
"""32 random lower-case hex digits."""

SnapshotId = NewType("SnapshotId", str)
"""64 lower-case hex digits: BLAKE3 of the manifest file's bytes. Any unique prefix serves as a reference."""

Namespace = NewType("Namespace", str)
"""``default`` or ``acme/prod``: 1-8 components."""

VmName = NewType("VmName", str)
"""``vm/100``, ``vm/web01``."""

DiskName = NewType("DiskName", str)
"""``scsi0``, ``virtio1``; also the stem of the file that a restore writes."""

ID_BYTES = 32
ZERO_ID = BlobId(bytes(ID_BYTES))
"""In a tree: "all zero". Never the id of a stored blob."""

DEFAULT_NAMESPACE = Namespace("default")

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_CONFIG_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9._@+ -]{0,254}")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:=/+-]{0,127}")
_HEX_ID = re.compile(r"[0-9a-f]{32}")
_MAX_NAMESPACE_DEPTH = 8


def _component(text: str, what: str) -> str:
    if not _COMPONENT.fullmatch(text):
        raise InvalidName(f"{what} {text!r} is not a valid name")
    return text


def parse_namespace(text: str) -> Namespace:
    """:raise InvalidName: for a bad component, more than 8 of them, or a component ``vm``."""
    parts = text.split("/")
    if len(parts) > _MAX_NAMESPACE_DEPTH:
        raise InvalidName(f"namespace {text!r} has more than {_MAX_NAMESPACE_DEPTH} levels")
    for part in parts:
        if _component(part, "namespace") == "vm":
            raise InvalidName(f"namespace {text!r}: 'vm' is reserved")
    return Namespace(text)


def parse_vm(text: str) -> VmName:
    """:raise InvalidName: when it is not ``vm/NAME``."""
    kind, slash, name = text.partition("/")
    if kind != "vm" or not slash:
        raise InvalidName(f"{text!r} is not the name of a VM: it must look like vm/100 or vm/web01")
    return VmName(f"vm/{_component(name, 'VM')}")


def parse_disk(text: str) -> DiskName:
    """:raise InvalidName: for anything that could not be a file name's stem on every system."""
    return DiskName(_component(text, "disk"))


def parse_config_name(text: str) -> str:
    """:raise InvalidName: for names that are empty, hold a slash, or are ``.`` or ``..``."""
    if not _CONFIG_NAME.fullmatch(text) or text in (".", ".."):
        raise InvalidName(f"config {text!r} is not a valid name")
    return text


def parse_label(text: str) -> str:
    """:raise InvalidName: for characters outside ``A-Za-z0-9._:=/+-``."""
    if not _LABEL.fullmatch(text):
        raise InvalidName(f"label {text!r} is not a valid label")
    return text


def parse_session(text: str) -> SessionId:
    """:raise InvalidName: when it is not 32 hex digits."""
    if not _HEX_ID.fullmatch(text):
        raise InvalidName(f"{text!r} is not a session id: it has 32 hexadecimal digits")
    return SessionId(text)


def is_pack_id(text: str) -> bool:
    return _HEX_ID.fullmatch(text) is not None


def _random_id() -> str:
    """128 random bits as hex. (``uuid`` and ``secrets`` would cost 15 ms of import for the same.)"""
    return os.urandom(16).hex()


def new_pack_id() -> PackId:
    return PackId(_random_id())


def new_session_id() -> SessionId:
    return SessionId(_random_id())


def new_repository_id() -> str:
    return _random_id()
