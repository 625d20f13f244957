"""The head of a stream as JSON."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, TypeVar

from casbackup.errors import ArchiveDamaged
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead
from casbackup.limits import MAX_DISK_BYTES

T = TypeVar("T")

_UUID_BYTES = 16


def encode_head(head: ArchiveHead) -> bytes:
    """ASCII; what is not UTF-8 in names is written as JSON's escapes of surrogates."""
    content = {
        "uuid": None if head.uuid is None else head.uuid.hex(),
        "time_s": head.time_s,
        "disks": [
            {"name": d.name, "size_bytes": d.size_bytes, "device_id": d.device_id, "vmstate": d.is_vmstate}
            for d in head.disks
        ],
        "configs": [{"name": c.name, "content": base64.b64encode(c.content).decode()} for c in head.configs],
    }
    return json.dumps(content).encode()


def decode_head(data: bytes, origin: str) -> ArchiveHead:
    """:raise ArchiveDamaged: when it is not understood."""
    try:
        content = json.loads(data)
        uuid = content.get("uuid")
        head = ArchiveHead(
            disks=tuple(_disk(disk) for disk in content["disks"]),
            configs=tuple(
                ArchiveConfig(_typed(c["name"], str), base64.b64decode(_typed(c["content"], str), validate=True))
                for c in content.get("configs", ())
            ),
            uuid=None if uuid is None else bytes.fromhex(_typed(uuid, str)),
            time_s=_optional_integer(content.get("time_s")),
        )
        if head.uuid is not None and len(head.uuid) != _UUID_BYTES:
            raise ValueError("a uuid has 32 hexadecimal digits")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error) as error:
        raise ArchiveDamaged(f"{origin}: the head is not understood: {type(error).__name__}: {error}") from error
    return head


def _disk(content: dict[str, Any]) -> ArchiveDisk:
    size = _integer(content["size_bytes"])
    if not 0 <= size <= MAX_DISK_BYTES:
        raise ValueError(f"a disk of {size} bytes")
    device_id = _optional_integer(content.get("device_id"))
    return ArchiveDisk(_typed(content["name"], str), size, device_id, _typed(content.get("vmstate", False), bool))


def _optional_integer(value: object) -> int | None:
    return None if value is None else _integer(value)


def _integer(value: object) -> int:
    number = _typed(value, int)
    if abs(number) >= 1 << 63:
        raise ValueError(f"{number} is out of range")
    return number


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} where {kind.__name__} was expected")
    return value
