"""What damage means is told exactly: snapshot, disk and byte ranges; the rest is restored, and a backup heals it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup.errors import DataDamage, IndexMissing, ManifestDamaged
from casbackup.ids import BlobId
from casbackup.jobs.restore import RestoreOptions, restore_disk
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, CheckReport, check
from casbackup.repository.rebuild import rebuild_index
from casbackup.repository.repair import repair
from casbackup.repository.repository import Repository
from casbackup.spec.indexdb import decode_entry
from casbackup.spec.node import Inner, Leaf, decode_node
from casbackup.spec.record import HEADER_BYTES
from casbackup.testing.world import Content, World, contents, disk_bytes
from casbackup.tree.diff import Range

_ZEROS = bytes(SEGMENT_BYTES - 40 * 4096)
DISK = disk_bytes(1, 40) + _ZEROS + disk_bytes(2, 40, tail=700)
CONTENT: Content = {"scsi0": DISK, "vm.conf": b"name: web01\n" * 20}
OTHER: Content = {"scsi0": disk_bytes(3, 30)}


class Place(NamedTuple):
    """Where a blob's record lies: header and payload."""

    path: str
    start: int
    end: int


class Damaged(NamedTuple):
    world: World
    repository: Repository
    snapshot: Snapshot
    other: Snapshot
    root: BlobId
    leaves: list[BlobId]
    chunks: list[tuple[Range, BlobId]]

    def place(self, blob_id: BlobId) -> Place:
        store = self.repository.store
        entry = store.entries([blob_id])[blob_id]
        path = store.storage._path(store.pack_rows()[entry.pack].pack)  # type: ignore[attr-defined]
        return Place(path, entry.offset, entry.offset + HEADER_BYTES + entry.stored_length)

    def flip(self, path: str, bit: int) -> None:
        content = bytearray(self.world.machine.content(path))
        content[bit // 8] ^= 1 << bit % 8
        self.world.machine.damage(path, bytes(content))
        self.repository.store.storage.close()  # type: ignore[attr-defined]

    def check(self, *, read_data: bool = True) -> CheckReport:
        return check(self.repository, CheckOptions(read_data=read_data))

    def heal(self) -> None:
        """Back the same up again, with which everything is well."""
        self.world.backup(self.repository, CONTENT)
        assert not self.check().damaged
        self.world.verify(self.repository)


@pytest.fixture
def stored(world: World) -> Damaged:
    return stored_in(world)


def stored_in(world: World) -> Damaged:
    repository = world.create(pack_bytes=2**26)
    snapshot = world.backup(repository, CONTENT)
    other = world.backup(repository, OTHER)
    root = snapshot.manifest.disks[0].root
    inner = decode_node(repository.store.read(root))
    assert isinstance(inner, Inner)
    chunks: list[tuple[Range, BlobId]] = []
    for number, child in enumerate(inner.children):
        offset = number * SEGMENT_BYTES
        leaf = decode_node(repository.store.read(child))
        assert isinstance(leaf, Leaf)
        for extent in leaf.extents:
            if not extent.is_zero:
                chunks.append((Range(offset, extent.length), extent.id))
            offset += extent.length
    return Damaged(world, repository, snapshot, other, root, inner.children, chunks)


def best_effort(repository: Repository, snapshot: Snapshot) -> tuple[bytes, list[Range]]:
    disk = snapshot.manifest.disks[0]
    target = MemoryDevice(disk.size_bytes)
    options = RestoreOptions(target_is_zero=True, best_effort=True)
    report = restore_disk(LocalPeer(repository), disk, target, options)
    return target.content(), report.lost


def without(content: bytes, ranges: Iterable[Range]) -> bytes:
    result = bytearray(content)
    for offset, length in ranges:
        result[offset : offset + length] = bytes(length)
    return bytes(result)


def bits_of(place: Place, count: int, seed: int = 0) -> list[int]:
    """Some bits of a record: a few of every part of the header, and of the payload."""
    source = random.Random(seed)
    header = [place.start * 8 + 8 * at + source.randrange(8) for at in (0, 4, 5, 6, 8, 12, 16, 47, 48, 63)]
    payload = [source.randrange((place.start + HEADER_BYTES) * 8, place.end * 8) for _ in range(count)]
    return header + payload


def expect(stored: Damaged, ranges: list[Range], *, config: str = "", found_without_reading: bool) -> None:
    """The damage is found, located, not restored, the rest is, a backup heals it."""
    with suppress(DataDamage):
        assert contents(stored.repository, stored.snapshot) == CONTENT, "never silently restored"
    assert contents(stored.repository, stored.other) == OTHER, "the rest is not affected"
    structure = stored.check(read_data=False)
    if found_without_reading:
        assert structure.damaged
    report = stored.check()
    assert report.damaged
    (affected,) = report.affected
    assert affected.snapshot.id == stored.snapshot.id
    if config:
        assert (affected.disk, affected.config) == (None, config)
    else:
        assert (affected.disk, list(affected.ranges)) == ("scsi0", ranges)
    restored, lost = best_effort(stored.repository, stored.snapshot)
    assert set(lost) <= set(ranges)
    assert restored == without(DISK, lost)
    stored.heal()


def test_a_flipped_bit_in_a_chunk(stored: Damaged) -> None:
    before = stored.world.photo("before")
    places = [(where, chunk, stored.place(chunk)) for where, chunk in (stored.chunks[1], stored.chunks[-1])]
    for where, chunk, place in places:
        for bit in bits_of(place, 3):
            stored.world.return_to(before, 1)
            again = stored._replace(repository=stored.world.open())
            again.flip(place.path, bit)
            expect(again, [where], found_without_reading=False)


def test_a_flipped_bit_in_a_leaf(stored: Damaged) -> None:
    before = stored.world.photo("before")
    for bit in bits_of(stored.place(stored.leaves[1]), 3):
        stored.world.return_to(before, 1)
        again = stored._replace(repository=stored.world.open())
        again.flip(again.place(stored.leaves[1]).path, bit)
        where = Range(SEGMENT_BYTES, len(DISK) - SEGMENT_BYTES)
        # A damaged checksum does not make a node unreadable: its id covers the content.
        expect(again, [where], found_without_reading=bit // 8 - again.place(stored.leaves[1]).start < 48)


def test_a_flipped_bit_in_an_inner_node(stored: Damaged) -> None:
    before = stored.world.photo("before")
    for bit in bits_of(stored.place(stored.root), 3):
        stored.world.return_to(before, 1)
        again = stored._replace(repository=stored.world.open())
        again.flip(again.place(stored.root).path, bit)
        expect(again, [Range(0, len(DISK))], found_without_reading=False)


def test_a_flipped_bit_in_a_config(stored: Damaged) -> None:
    before = stored.world.photo("before")
    config = stored.snapshot.manifest.configs[0].id
    for bit in bits_of(stored.place(config), 3):
        stored.world.return_to(before, 1)
        again = stored._replace(repository=stored.world.open())
        again.flip(again.place(config).path, bit)
        expect(again, [], config="vm.conf", found_without_reading=False)


def packs(stored: Damaged) -> list[str]:
    """The pack of the snapshot, and the pack of the other one."""
    return [stored.place(s.manifest.disks[0].root).path for s in (stored.snapshot, stored.other)]


def rebuilt_from_nothing(stored: Damaged) -> Damaged:
    stored.world.close()
    shutil.rmtree(Path(stored.world.root, "index"))
    fs = stored.world.machine.process()
    with pytest.raises(IndexMissing):
        Repository.open(stored.world.root, fs=stored.world.machine.process())
    rebuild_index(stored.world.root, fs=fs)
    return stored._replace(repository=stored.world.open())


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.99, None])
def test_a_pack_that_is_truncated_or_gone(stored: Damaged, part: float | None, rebuild: bool) -> None:
    path = packs(stored)[0]
    content = stored.world.machine.content(path)
    if part is None:
        stored.repository.fs.remove(path)
    else:
        stored.world.machine.damage(path, content[: int(len(content) * part)])
    stored.repository.store.storage.close()  # type: ignore[attr-defined]
    if rebuild:
        stored = rebuilt_from_nothing(stored)
    with pytest.raises(DataDamage):
        contents(stored.repository, stored.snapshot)
    assert contents(stored.repository, stored.other) == OTHER
    report = stored.check(read_data=False)
    assert report.damaged
    assert {affected.snapshot.id for affected in report.affected} == {stored.snapshot.id}
    (disk,) = [affected for affected in report.affected if affected.disk]
    restored, lost = best_effort(stored.repository, stored.snapshot)
    assert lost == list(disk.ranges)
    assert restored == without(DISK, lost)
    stored.heal()


@pytest.mark.parametrize("seed", range(6))
def test_a_pack_with_many_damages_is_repaired(stored: Damaged, seed: int) -> None:
    """Repair moves what is sound, puts the pack aside, and knows what is lost."""
    source = random.Random(seed)
    path = packs(stored)[0]
    size = len(stored.world.machine.content(path))
    for _ in range(1 + seed):
        stored.flip(path, source.randrange(size * 8))
    stored.check(read_data=seed % 2 == 0)
    repair(stored.repository)
    restored, lost = best_effort(stored.repository, stored.snapshot)
    assert restored == without(DISK, lost)
    after = stored.check()
    assert {r for a in after.affected for r in a.ranges} >= set(lost)
    stored.heal()
    world = stored.world
    world.gc(stored.repository)
    world.verify(stored.repository)


def test_repair_does_not_vouch_for_what_it_finds_damaged_itself(stored: Damaged) -> None:
    """One chunk is known to be damaged; another one in the same pack is, but nobody knows."""
    known, unknown = stored.chunks[0][1], stored.chunks[-1][1]
    for chunk in (known, unknown):
        place = stored.place(chunk)
        stored.flip(place.path, (place.end - 5) * 8)
    report = check(stored.repository, CheckOptions(read_data=True, subset_percent=100))
    assert report.damaged
    # Only the first is known from here on.
    _unmark(stored, unknown)
    repair(stored.repository)
    session = stored.repository.sessions.open(stored.snapshot.manifest.namespace, stored.snapshot.manifest.vm)
    assert session.missing([known, unknown]) == {known, unknown}
    session.abort()
    stored.heal()


def _unmark(stored: Damaged, blob_id: BlobId) -> None:
    index = stored.repository.index

    def change(txn: object) -> None:
        value = txn.get(blob_id, db=index.blobs)  # type: ignore[attr-defined]
        txn.put(blob_id, decode_entry(value)._replace(state=0).encode(), db=index.blobs)  # type: ignore[attr-defined]

    index.write(change)


def test_a_known_damage_is_never_vouched_for_through_garbage(world: World) -> None:
    """A tree node that no snapshot needs names a chunk that was found damaged; a backup gets back to that content."""
    repository = world.create()
    base = disk_bytes(5, 60)
    variant = base[: 40 * 4096]
    garbage = world.backup(repository, {"scsi0": variant})
    kept = world.backup(repository, {"scsi0": base})
    leaves = [decode_node(repository.store.read(s.manifest.disks[0].root)) for s in (garbage, kept)]
    shared = {e.id for e in leaves[0].extents} & {e.id for e in leaves[1].extents}  # type: ignore[union-attr]
    assert shared
    world.forget(repository, garbage)
    damaged = Damaged(world, repository, kept, kept, kept.manifest.disks[0].root, [], [])
    place = damaged.place(min(shared))
    damaged.flip(place.path, (place.end - 5) * 8)
    assert damaged.check().damaged
    snapshot = world.backup(repository, {"scsi0": variant})
    assert contents(repository, snapshot) == {"scsi0": variant}
    assert not damaged.check().damaged, "and that healed the other one"


# --- manifests


def test_a_damaged_manifest_without_a_copy_stops_gc_and_nothing_else(stored: Damaged) -> None:
    path = stored.repository.layout.manifest(stored.snapshot.key)
    good = stored.world.machine.content(path)
    stored.world.machine.damage(path, good[:-1])
    stored = rebuilt_from_nothing(stored)
    report = stored.check()
    assert any(path in finding.object for finding in report.findings)
    with pytest.raises(ManifestDamaged):
        stored.world.gc(stored.repository)
    found, damaged = stored.repository.catalog.survey()
    assert [s.id for s in found] == [stored.other.id]
    assert len(damaged) == 1
    assert contents(stored.repository, stored.other) == OTHER
    again = stored.world.backup(stored.repository, OTHER)
    assert again.manifest.sequence > stored.other.manifest.sequence
    stored.world.machine.damage(path, good)
    stored.world.gc(stored.repository)
    stored.world.verify(stored.repository)


def test_a_manifest_in_the_place_of_another_is_not_believed(stored: Damaged) -> None:
    machine, layout = stored.world.machine, stored.repository.layout
    machine.damage(layout.manifest(stored.snapshot.key), machine.content(layout.manifest(stored.other.key)))
    assert stored.check().damaged
    repair(stored.repository)
    stored.world.verify(stored.repository)


# --- the index


def test_an_index_rebuilt_from_nothing_knows_all(stored: Damaged) -> None:
    before = snapshot_of_index(stored.repository)
    again = rebuilt_from_nothing(stored)
    assert snapshot_of_index(again.repository) == before
    again.world.verify(again.repository)
    again.heal()
    again.world.gc(again.repository)
    again.world.verify(again.repository)


def snapshot_of_index(repository: Repository) -> dict[BlobId, tuple[int, int, int, int]]:
    with repository.index.read() as txn, txn.cursor(db=repository.index.blobs) as cursor:
        ids = [BlobId(bytes(key)) for key, _ in cursor]
    return {i: (e.offset, e.stored_length, e.plain_length, e.kind) for i, e in repository.store.entries(ids).items()}


@pytest.mark.parametrize("keep_other", [False, True])
def test_a_rebuilt_index_vouches_for_no_node_whose_chunks_are_gone(world: World, keep_other: bool) -> None:
    """Garbage that gc took out of the index is still in packs: nodes whose chunks have been deleted long ago."""
    repository = world.create()
    chunks, nodes = disk_bytes(1, 300), disk_bytes(2, 60)
    session_content: Content = {"a": chunks}
    old = world.backup(repository, session_content)
    if keep_other:
        world.backup(repository, {"b": nodes})
    rows = repository.store.pack_rows()
    assert len(rows) >= 2, "the chunks fill a pack; their leaf lies in another"
    world.forget(repository, old)
    leaf_pack = repository.store.entries([old.manifest.disks[0].root])[old.manifest.disks[0].root].pack
    _lose_all_but_the_pack_of_the_leaf(world, repository, leaf_pack)
    world.close()
    rebuild_index(world.root, fs=world.machine.process())
    repository = world.open()
    snapshot = world.backup(repository, session_content)
    assert contents(repository, snapshot) == session_content
    world.verify(repository)


def _lose_all_but_the_pack_of_the_leaf(world: World, repository: Repository, leaf_pack: int) -> None:
    """What a gc leaves that dropped the packs of the chunks and was cut short before that of the leaf."""
    kept = {r.root for s in repository.catalog.all() for r in s.manifest.disks}
    needed = {entry.pack for entry in repository.store.entries(list(kept)).values()}
    for number, row in repository.store.pack_rows().items():
        if number not in {leaf_pack, *needed}:
            repository.store.storage.delete(row.pack)
