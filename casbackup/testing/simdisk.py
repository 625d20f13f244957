"""Files and folders in memory, in two layers: what the machine sees now, and what a crash leaves.

A file's bytes are durable up to its last ``sync``. A folder's names are durable up to its last ``sync``;
what was done to them since then is kept as a list of changes in order, of which a crash applies some
beginning. Renaming within a folder is one change. Renaming across folders is two, and the name that goes
never goes without the one that comes, so that a crash may leave a file under both names but never under
none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


class SimulatedFile:
    """An inode: pieces of bytes in order, the first ``synced_bytes`` of which survive."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.size_bytes = 0
        self.synced_bytes = 0
        self.exclusive: object = None
        self.shared: list[object] = []

    def append(self, data: bytes) -> None:
        if data:
            self._pieces.append(data)
            self.size_bytes += len(data)

    def content(self) -> bytes:
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def damage(self, content: bytes) -> None:
        """Replace the bytes behind everybody's back, durably."""
        self._pieces = [content]
        self.size_bytes = self.synced_bytes = len(content)

    def sync(self) -> None:
        self.synced_bytes = self.size_bytes

    def forget(self, seed: int) -> None:
        """Lose what a crash may lose: all that is unsynced, its end, or the content of its last bytes."""
        content = self.content()
        if seed == LOSE_ALL:
            self.damage(content[: self.synced_bytes])
        elif seed != LOSE_NOTHING:
            self.damage(_torn(content, self.synced_bytes, random.Random(seed)))
        self.sync()
        self.exclusive, self.shared = None, []

    def copy(self) -> SimulatedFile:
        other = SimulatedFile()
        other._pieces = list(self._pieces)
        other.size_bytes, other.synced_bytes = self.size_bytes, self.synced_bytes
        return other


LOSE_ALL = 0
"""As the seed of a crash: nothing that is not durable survives."""

LOSE_NOTHING = 1
"""As the seed of a crash: everything survives; only the processes are gone."""


def _torn(content: bytes, synced: int, source: random.Random) -> bytes:
    how = source.choice(("lost", "cut", "zeros", "garbage", "kept"))
    if how == "kept" or synced == len(content):
        return content
    if how == "lost":
        return content[:synced]
    end = source.randint(synced, len(content))
    if how == "cut":
        return content[:end]
    start = source.randint(synced, end)
    return content[:start] + (bytes(end - start) if how == "zeros" else source.randbytes(end - start))


@dataclass(eq=False, slots=True)
class Change:
    """Names that a folder gets, or loses (None), in one step.

    ``needs``: the change in another folder without which this one does not survive.
    """

    names: Mapping[str, Node | None]
    needs: Change | None = None
    durable: bool = False


@dataclass(eq=False, slots=True)
class SimulatedFolder:
    """``names`` as seen now; ``kept`` as of the last sync; ``changes`` in between."""

    names: dict[str, Node] = field(default_factory=dict)
    kept: dict[str, Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, names: Mapping[str, Node | None], needs: Change | None = None) -> Change:
        change = Change(names, needs)
        self.changes.append(change)
        _apply(self.names, change)
        return change

    def sync(self) -> None:
        self.kept = dict(self.names)
        for change in self.changes:
            change.durable = True
        self.changes = []

    def files(self) -> Iterator[SimulatedFile]:
        """All files below, by the names as seen now; one with several names comes several times."""
        for node in self.names.values():
            if isinstance(node, SimulatedFile):
                yield node
            else:
                yield from node.files()

    def copy(self) -> SimulatedFolder:
        """The whole tree, both layers, independent of this one."""
        return _Copier().folder(self)

    def forget(self, seed: int) -> None:
        """Lose what a crash may lose, here and below. Afterwards both layers are the same."""
        reachable = list(_tree(self, set()))
        source = random.Random(seed)
        lengths = [_surviving(folder, seed, source) for folder in reachable]
        for folder, length in zip(reachable, lengths, strict=True):
            for change in folder.changes[:length]:
                change.durable = True
        while _withhold(reachable):
            pass
        for folder in reachable:
            for change in folder.changes:
                if change.durable:
                    _apply(folder.kept, change)
            folder.names, folder.changes = dict(folder.kept), []
        for file in dict.fromkeys(self.files()):
            file.forget(seed if seed in (LOSE_ALL, LOSE_NOTHING) else source.randrange(2, 2**32))


Node = SimulatedFile | SimulatedFolder


def _apply(names: dict[str, Node], change: Change) -> None:
    for name, node in change.names.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _surviving(folder: SimulatedFolder, seed: int, source: random.Random) -> int:
    if seed in (LOSE_ALL, LOSE_NOTHING):
        return 0 if seed == LOSE_ALL else len(folder.changes)
    return source.randint(0, len(folder.changes))


def _withhold(folders: list[SimulatedFolder]) -> bool:
    """Take back, in each folder, all changes from the first on that needs one which does not survive."""
    withheld = False
    for folder in folders:
        alive = True
        for change in folder.changes:
            alive = alive and change.durable and (change.needs is None or change.needs.durable)
            withheld = withheld or (change.durable and not alive)
            change.durable = alive
    return withheld


def _tree(folder: SimulatedFolder, seen: set[int]) -> Iterator[SimulatedFolder]:
    """All folders that are reachable now or may be after a crash, parents first."""
    if id(folder) in seen:
        return
    seen.add(id(folder))
    yield folder
    changed = [node for change in folder.changes for node in change.names.values()]
    for node in (*folder.names.values(), *folder.kept.values(), *changed):
        if isinstance(node, SimulatedFolder):
            yield from _tree(node, seen)


class _Copier:
    """Copies a tree so that what was one object stays one object."""

    def __init__(self) -> None:
        self._copies: dict[int, Node] = {}
        self._changes: dict[int, Change] = {}

    def folder(self, original: SimulatedFolder) -> SimulatedFolder:
        copy = self._copies[id(original)] = SimulatedFolder()
        copy.names = {name: self._node(node) for name, node in original.names.items()}
        copy.kept = {name: self._node(node) for name, node in original.kept.items()}
        copy.changes = [self._change(change) for change in original.changes]
        return copy

    def _node(self, original: Node) -> Node:
        known = self._copies.get(id(original))
        if known is not None:
            return known
        if isinstance(original, SimulatedFolder):
            return self.folder(original)
        copy = self._copies[id(original)] = original.copy()
        return copy

    def _change(self, original: Change) -> Change:
        known = self._changes.get(id(original))
        if known is None:
            known = self._changes[id(original)] = Change({}, None, original.durable)
            known.names = {name: node and self._node(node) for name, node in original.names.items()}
            known.needs = original.needs and self._change(original.needs)
        return known
