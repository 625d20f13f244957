"""The first member of an archive: what a tar header cannot say (``docs/spec/tar.md``)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.port import ArchiveDisk, ArchiveHead
from casbackup.limits import MAX_CONFIG_BYTES, MAX_CONFIGS, MAX_DISK_BYTES, MAX_DISKS

MEMBER = "casbackup.json"
FORMAT_NAME = "casbackup-tar"
VERSION = 1

_UNSAFE = re.compile(r"[^\w.+=@ -]|^[.~ -]")


@dataclass(frozen=True, slots=True)
class ConfigMember:
    name: str
    member: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DiskMember:
    disk: ArchiveDisk
    member: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """``configs`` and ``disks`` stand in the archive in this order, configs first."""

    configs: tuple[ConfigMember, ...]
    disks: tuple[DiskMember, ...]
    uuid: bytes | None
    time_s: int | None


def manifest_of(head: ArchiveHead) -> Manifest:
    """Members are named after their disks and configs; names may be anything, so what is unsafe is escaped."""
    return Manifest(
        tuple(ConfigMember(c.name, f"config/{_safe(c.name)}", len(c.content)) for c in head.configs),
        tuple(DiskMember(disk, f"{_safe(disk.name)}.raw") for disk in head.disks),
        head.uuid,
        head.time_s,
    )


def encode_manifest(manifest: Manifest) -> bytes:
    document: dict[str, Any] = {"format": FORMAT_NAME, "version": VERSION}
    if manifest.time_s is not None:
        document["time"] = manifest.time_s
    if manifest.uuid is not None:
        document["uuid"] = manifest.uuid.hex()
    document["configs"] = [{"name": c.name, "member": c.member, "size": c.size_bytes} for c in manifest.configs]
    document["disks"] = [_encode_disk(d.disk, d.member) for d in manifest.disks]
    return json.dumps(document, indent=1).encode("ascii") + b"\n"


def parse_manifest(data: bytes, archive: str) -> Manifest:
    """:raise ArchiveDamaged: when it is not what version 1 is. :raise ArchiveUnsupported: for a later version."""
    try:
        document = json.loads(data)
        if document["format"] != FORMAT_NAME:
            raise ValueError("of another program")
        version = _integer(document, "version", 1, 2**31)
        if version != VERSION:
            raise ArchiveUnsupported(f"{archive}: its manifest has version {version}; this reads version {VERSION}")
        return _parsed(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArchiveDamaged(f"{archive}: {MEMBER} is not a manifest: {error}") from error


def _encode_disk(disk: ArchiveDisk, member: str) -> dict[str, Any]:
    document: dict[str, Any] = {"name": disk.name, "member": member, "size": disk.size_bytes}
    if disk.device_id is not None:
        document["device_id"] = disk.device_id
    if disk.is_vmstate:
        document["vmstate"] = True
    return document


def _parsed(document: dict[str, Any]) -> Manifest:
    uuid = None if document.get("uuid") is None else bytes.fromhex(_text(document, "uuid"))
    if uuid is not None and len(uuid) != 16:
        raise ValueError("a uuid has 16 bytes")
    configs = tuple(map(_parsed_config, _list(document, "configs", MAX_CONFIGS)))
    disks = tuple(map(_parsed_disk, _list(document, "disks", MAX_DISKS)))
    time_s = None if document.get("time") is None else _integer(document, "time", -(2**63), 2**63)
    return Manifest(configs, disks, uuid, time_s)


def _parsed_config(entry: dict[str, Any]) -> ConfigMember:
    return ConfigMember(_text(entry, "name"), _text(entry, "member"), _integer(entry, "size", 0, MAX_CONFIG_BYTES))


def _parsed_disk(entry: dict[str, Any]) -> DiskMember:
    device_id = None if entry.get("device_id") is None else _integer(entry, "device_id", 0, 2**32)
    size_bytes = _integer(entry, "size", 0, MAX_DISK_BYTES)
    disk = ArchiveDisk(_text(entry, "name"), size_bytes, device_id, entry.get("vmstate", False) is True)
    return DiskMember(disk, _text(entry, "member"))


def _integer(entry: dict[str, Any], key: str, least: int, most: int) -> int:
    value = entry[key]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is not a number from {least} to {most}")
    return value


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is not a string")
    return value


def _list(document: dict[str, Any], key: str, most: int) -> list[dict[str, Any]]:
    value = document[key]
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{key} is not a list of at most {most} entries")
    return value


def _safe(name: str) -> str:
    """The name with ``%XX`` for all that is unsafe in a file's name; different names stay different."""
    return _UNSAFE.sub(_escaped, name) or "%"


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))
