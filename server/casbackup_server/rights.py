"""What a token permits: rights, over namespaces and VMs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from casbackup.errors import RightMissing
from casbackup.ids import Namespace, VmName


class Right(StrEnum):
    """``read``: list snapshots and what they cost. ``backup``: make snapshots. ``restore``: get their data.
    ``prune``: forget snapshots, change pins, labels and notes. ``admin``: everything. Each includes ``read``.
    """

    READ = "read"
    BACKUP = "backup"
    RESTORE = "restore"
    PRUNE = "prune"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Grant:
    """Rights over all VMs whose namespace and name match one of the patterns each (``*``, ``?``, ``[...]``; ``*``
    matches ``/``, too).

    ``isolated``: whoever has it learns nothing of blobs that are not of the VM in question.
    """

    rights: frozenset[Right]
    namespaces: tuple[str, ...] = ("*",)
    vms: tuple[str, ...] = ("*",)
    isolated: bool = False

    def has(self, right: Right) -> bool:
        return Right.ADMIN in self.rights or right in self.rights or (right is Right.READ and bool(self.rights))

    def covers(self, namespace: Namespace, vm: VmName) -> bool:
        return _matches(namespace, self.namespaces) and _matches(vm, self.vms)

    @property
    def covers_all(self) -> bool:
        return "*" in self.namespaces and "*" in self.vms


ALL = Grant(frozenset({Right.ADMIN}))


@dataclass(frozen=True, slots=True)
class Access:
    """Who makes a request, and what they may do. ``name`` is for logs."""

    name: str
    grant: Grant

    def require(self, right: Right, namespace: Namespace | None = None, vm: VmName | None = None) -> None:
        """:raise RightMissing: naming the right, when it is not granted, or not for this VM."""
        if not self.grant.has(right):
            raise RightMissing(f"this needs the right {right.value!r}, which token {self.name} has not")
        if namespace is not None and vm is not None and not self.grant.covers(namespace, vm):
            raise RightMissing(f"token {self.name} has no right {right.value!r} for {vm} in namespace {namespace}")

    def require_any(self, *rights: Right) -> None:
        """:raise RightMissing: naming the rights, when none of them is granted."""
        if not any(map(self.grant.has, rights)):
            wanted = " or ".join(repr(right.value) for right in rights)
            raise RightMissing(f"this needs the right {wanted}, which token {self.name} has not")

    def require_all(self, right: Right) -> None:
        """For what is about the whole repository.

        :raise RightMissing: when the token is only for some of it.
        """
        self.require(right)
        if not self.grant.covers_all or self.grant.isolated:
            raise RightMissing(f"this is about the whole repository, and token {self.name} only for a part of it")

    def sees(self, namespace: Namespace, vm: VmName) -> bool:
        return self.grant.has(Right.READ) and self.grant.covers(namespace, vm)

    @property
    def stamps(self) -> bool:
        """Does the server set time and host of its snapshots? Only who may prune anyway is trusted with them."""
        return not self.grant.has(Right.PRUNE)


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)
