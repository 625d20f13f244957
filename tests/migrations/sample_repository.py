"""A repository of the imaginary format, on any file system: made, looked at, checked."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from casbackup.fs import FileSystem, write_durably
from casbackup.spec.config import RepositoryConfig, encode_config

IDENTITY = "0123456789abcdef" * 2
CREATED = "2026-11-22T20:00:00.000Z"


def inventory(count: int) -> dict[str, dict[str, str]]:
    return {f"{'abc'[n % 3]}{n:03}": {"size": str(n), "colour": "red=dark"} for n in range(count)}


def build(fs: FileSystem, root: str, count: int) -> None:
    """A repository of format 1 with so many things in its inventory."""
    fs.make_folders(os.path.join(root, "inventory"))
    for name, content in inventory(count).items():
        lines = "".join(f"{key}={value}\n" for key, value in content.items())
        write_durably(fs, os.path.join(root, "inventory", f"{name}.txt"), lines.encode(), replace=False)
    for name in ("config.json", "config.json.backup"):
        config = encode_config(RepositoryConfig(IDENTITY, CREATED, format=1))
        write_durably(fs, os.path.join(root, name), config, replace=False)


class Seen(NamedTuple):
    """What a repository looks like: ``files`` are those of the inventory, in whichever form."""

    format: int
    backup_format: int
    files: frozenset[str]
    in_migration: bool
    leftovers: frozenset[str]


def look(fs: FileSystem, root: str) -> Seen:
    def number(name: str) -> int:
        found: int = json.loads(fs.read(os.path.join(root, name)))["format"]
        return found

    files: set[str] = set()
    for folder in ("inventory", *(f"shelves/{e.name}" for e in fs.list(os.path.join(root, "shelves")))):
        files |= {f"{folder}/{entry.name}" for entry in fs.list(os.path.join(root, folder))}
    names = {entry.name for entry in fs.list(root)}
    return Seen(
        number("config.json"),
        number("config.json.backup"),
        frozenset(files),
        "migration.json" in names,
        frozenset(name for name in names if name.endswith(".tmp")),
    )


def original(count: int) -> Seen:
    """A repository of format 1 that nobody has touched."""
    return Seen(1, 1, frozenset(f"inventory/{name}.txt" for name in inventory(count)), False, frozenset())


def migrated(count: int) -> Seen:
    """The same after a migration to format 3."""
    return Seen(3, 3, frozenset(f"shelves/{n[0]}/{n}.json" for n in inventory(count)), False, frozenset())


def check_migrated(fs: FileSystem, root: str, count: int) -> None:
    """Format 3, all of it, and nothing else."""
    assert look(fs, root) == migrated(count)
    for name, content in inventory(count).items():
        assert json.loads(fs.read(os.path.join(root, "shelves", name[0], f"{name}.json"))) == content
    config = json.loads(fs.read(os.path.join(root, "config.json")))
    assert (config["repository_id"], config["created"]) == (IDENTITY, CREATED)
    assert config["compression_level"] == 5


def check_interrupted(fs: FileSystem, root: str, count: int) -> None:
    """Nothing is changed yet, or all is done, or ``migration.json`` says what is going on."""
    seen = look(fs, root)._replace(leftovers=frozenset())
    assert seen.in_migration or seen in (original(count), migrated(count))
