"""What a backup will ask for first: the nodes of the VM's last snapshot."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.errors import DataDamage
from casbackup.ids import ZERO_ID, BlobId
from casbackup.repository.accounting import outlines
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session
from casbackup.spec.manifest import DiskRecord
from casbackup.spec.outline import decode_children
from casbackup.tree.builder import level_of


def known_nodes(repository: Repository, session: Session, disks: tuple[DiskRecord, ...], limit: int) -> list[BlobId]:
    """Nodes of these disks that are stored and stay so until the session ends; ``limit`` at most."""
    found: dict[BlobId, None] = {}
    for disk in disks:
        for node in _nodes(repository, disk):
            if len(found) >= limit:
                break
            found[node] = None
    missing = session.missing(list(found))
    return [node for node in found if node not in missing]


def _nodes(repository: Repository, disk: DiskRecord) -> Iterator[BlobId]:
    """From the root downwards, a level at a time; what is below a damaged node is left out."""
    level = level_of(disk.size_bytes)
    nodes = [disk.root] if disk.root != ZERO_ID else []
    while nodes:
        yield from nodes
        if level == 0:
            return
        try:
            found = outlines(repository, nodes)
        except DataDamage:
            return
        nodes = list(dict.fromkeys(child for node in nodes for child in decode_children(found[node])))
        level -= 1
