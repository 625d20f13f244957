"""``config.json``: what a repository is. Human-readable, written once (and by a migration); ``docs/spec/config.md``.

The same text lies beside it as ``config.json.backup``.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from casbackup.errors import ConfigDamaged, MigrationNeeded, UnsupportedFormat
from casbackup.limits import BLOCK_BYTES, PACK_BYTES, SEGMENT_BLOCKS

FORMAT = 1
"""The format that this version writes. Older ones are migrated, newer ones refused."""

OLDEST_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ChunkerConfig:
    """Parameters of the ``block-sample`` chunker. The tree's format does not depend on them: any extents are legal."""

    name: str = "block-sample"
    min_blocks: int = 4
    max_blocks: int = 64
    cuts_in_256: int = 40
    zero_run_blocks: int = 4

    def __post_init__(self) -> None:
        _require_types(self)
        if self.name != "block-sample":
            raise ValueError(f"chunker {self.name!r} is unknown")
        if not 1 <= self.min_blocks <= self.max_blocks <= SEGMENT_BLOCKS:
            raise ValueError("chunk sizes contradict each other")
        if not 1 <= self.cuts_in_256 <= 255 or not 1 <= self.zero_run_blocks <= SEGMENT_BLOCKS:
            raise ValueError("chunker parameters are out of range")

    @property
    def max_bytes(self) -> int:
        return self.max_blocks * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class RepositoryConfig:
    """The whole of config.json."""

    repository_id: str
    created: str
    format: int = FORMAT
    chunker: ChunkerConfig = field(default_factory=ChunkerConfig)
    compression_level: int = 2
    pack_bytes: int = PACK_BYTES
    key_fingerprint: str = ""
    """Of the master key if the repository is encrypted; only then is it written."""

    def __post_init__(self) -> None:
        _require_types(self)
        if not re.fullmatch("[0-9a-f]{32}", self.repository_id):
            raise ValueError(f"repository id {self.repository_id!r} has not 32 hexadecimal digits")
        if not -7 <= self.compression_level <= 19:
            raise ValueError(f"compression level {self.compression_level} is out of range")
        if not 2**20 <= self.pack_bytes <= 2**30:
            raise ValueError(f"a pack size of {self.pack_bytes} bytes is out of range")
        if not re.fullmatch("(|[0-9a-f]{32})", self.key_fingerprint):
            raise ValueError(f"key fingerprint {self.key_fingerprint!r} has not 32 hexadecimal digits")

    @property
    def encrypted(self) -> bool:
        return bool(self.key_fingerprint)


def _require_types(config: ChunkerConfig | RepositoryConfig) -> None:
    """JSON can hold anything anywhere."""
    expected = {"int": int, "str": str, "ChunkerConfig": ChunkerConfig}
    for item in fields(config):
        value = getattr(config, item.name)
        if type(value) is not expected[str(item.type)]:
            raise TypeError(f"{item.name} is {value!r}")


def encode_config(config: RepositoryConfig) -> bytes:
    content = {"casbackup": "repository", **asdict(config)}
    if not config.encrypted:
        del content["key_fingerprint"]
    return json.dumps(content, indent=2).encode() + b"\n"


def decode_config(data: bytes, origin: str) -> RepositoryConfig:
    """Parse and check; ``origin`` names the file in errors.

    :raise UnsupportedFormat: when a newer casbackup wrote it.
    :raise MigrationNeeded: when its format is older than this version writes.
    :raise ConfigDamaged: when it is not understood.
    """
    found = format_of(data, origin)
    if found > FORMAT:
        raise UnsupportedFormat(f"{origin} has format {found}; this casbackup knows formats up to {FORMAT}")
    if found < FORMAT:
        raise MigrationNeeded(f"{origin} has format {found}; this casbackup uses format {FORMAT}")
    content: dict[str, Any] = json.loads(data)
    content.pop("casbackup")
    try:
        return RepositoryConfig(**{**content, "chunker": ChunkerConfig(**content["chunker"])})
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigDamaged(f"{origin} is not understood: {error}") from error


def format_of(data: bytes, origin: str) -> int:
    """The format number of a config.json of any version.

    :raise ConfigDamaged: when there is none.
    """
    try:
        content = json.loads(data)
        number = content["format"] if content["casbackup"] == "repository" else None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigDamaged(f"{origin} is not understood: {error}") from error
    if type(number) is not int or number < 0:
        raise ConfigDamaged(f"{origin} names no format")
    return number
