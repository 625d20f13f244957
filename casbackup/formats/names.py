"""From the names in an archive, which may be anything, to names of ours, which are safe as names of files.

A disk's name loses the prefix ``drive-`` that Proxmox VE gives it. Every character that is not allowed becomes ``_``,
and so does a leading one that may not lead. What is too long is cut. Of names that are equal then, the first keeps
its name, and the others get ``-2``, ``-3``, … in the order of the archive; so the same archive always gives the same
names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from casbackup.formats.port import ArchiveHead
from casbackup.ids import DiskName, parse_config_name, parse_disk

Name = TypeVar("Name", bound=str)

DRIVE_PREFIX = "drive-"
_MOST = 100
"""Characters of a name at the most; room is left for a suffix."""


def disk_names(names: Iterable[str]) -> list[DiskName]:
    """A valid and distinct name for each disk."""
    return _distinct((_disk(name) for name in names), parse_disk)


def config_names(names: Iterable[str]) -> list[str]:
    """A valid and distinct name for each config."""
    return _distinct((_config(name) for name in names), parse_config_name)


def file_names(head: ArchiveHead) -> tuple[list[str], list[str]]:
    """Names of files for all disks, with the suffix ``.raw``, and configs; all distinct."""
    disks = [f"{name}.raw" for name in disk_names(disk.name for disk in head.disks)]
    both = _distinct([*disks, *(_config(config.name) for config in head.configs)], parse_config_name)
    return disks, both[len(disks) :]


def vm_component(name: str) -> str:
    """A valid NAME of ``vm/NAME``."""
    return _component(name)


def _disk(name: str) -> str:
    return _component(name.removeprefix(DRIVE_PREFIX) or name)


def _component(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_MOST]
    return safe if re.match(r"[A-Za-z0-9_]", safe) else f"_{safe[1:]}"


def _config(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._@+ -]", "_", name)[:_MOST]
    return safe if re.match(r"[A-Za-z0-9_]", safe) else f"_{safe[1:]}"


def _distinct(names: Iterable[str], parse: Callable[[str], Name]) -> list[Name]:
    given = list(names)
    taken = set[str]()
    found: list[Name] = []
    for name in given:
        chosen, number = name, 1
        while chosen in taken or (number > 1 and chosen in given):
            number += 1
            chosen = f"{name}-{number}"
        taken.add(chosen)
        found.append(parse(chosen))
    return found
