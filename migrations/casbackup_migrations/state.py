"""``migration.json``, in the repository's folder from before a migration's first change until after its last.

While it is there, the folder is of no use but to be migrated further.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from casbackup.errors import ConfigDamaged, UnsupportedFormat

_VERSION = 1


@dataclass(frozen=True, slots=True)
class MigrationState:
    """``step``: the format from which the step being worked on starts. ``started`` is for people."""

    from_format: int
    to_format: int
    step: int
    started: str

    def allows(self, config_format: int) -> bool:
        """Can config.json have this format? The step may or may not have been committed."""
        return config_format in (self.step, self.step + 1)


def encode_state(state: MigrationState) -> bytes:
    content = {
        "casbackup": "migration",
        "version": _VERSION,
        "from": state.from_format,
        "to": state.to_format,
        "step": state.step,
        "started": state.started,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def decode_state(data: bytes, origin: str) -> MigrationState:
    """Parse and check; ``origin`` names the file in errors.

    :raise UnsupportedFormat: when a newer casbackup wrote it.
    :raise ConfigDamaged: when it is not understood.
    """
    try:
        content = json.loads(data)
        if content["casbackup"] != "migration":
            raise ValueError("it is no state of a migration")
        version = _number(content["version"])
        if version > _VERSION:
            raise UnsupportedFormat(f"a newer casbackup began a migration (version {version} of {origin})")
        state = MigrationState(
            _number(content["from"]),
            _number(content["to"]),
            _number(content["step"]),
            str(content["started"]),
        )
        if not state.from_format <= state.step < state.to_format:
            raise ValueError("its numbers contradict each other")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigDamaged(
            f"{origin} is damaged ({error}): which migration was interrupted is not known. "
            "If no other version of casbackup was used, remove that file and migrate again"
        ) from error
    return state


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no version number")
    return value
