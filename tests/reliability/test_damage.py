"""Damage of every kind: it is found, its meaning is said, nothing wrong is ever restored, and a new backup heals it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup.errors import CasbackupError, ConfigDamaged, DataDamage, IndexDamaged, IndexMissing, ManifestDamaged
from casbackup.fs import RealFileSystem, write_durably
from casbackup.ids import BlobId, VmName
from casbackup.jobs.backup import backup
from casbackup.jobs.restore import RestoreOptions, read_config, restore_disk
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, CheckReport, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.rebuild import rebuild_index
from casbackup.repository.repair import repair
from casbackup.repository.repository import Repository
from casbackup.spec.config import encode_config
from casbackup.spec.indexdb import BlobEntry
from casbackup.spec.node import Extent, Inner, Leaf, decode_node
from casbackup.spec.pack import CHECKED_BYTES, ENTRY_BYTES, TRAILER_BYTES
from casbackup.spec.record import HEADER_BYTES
from casbackup.testing.clock import FakeClock
from casbackup.testing.world import VM, Content, contents, disk_bytes, request
from casbackup.tree.diff import Range, merged

OTHER_VM = VmName("vm/200")
DISK = "scsi0"
CONFIG = "qemu-server.conf"
FULL = CheckOptions(read_data=True)


def text(seed: int, lines: int) -> bytes:
    """Content that can be compressed, and whose blocks differ."""
    return b"".join(f"line {number:08} of text {seed}\n".encode() for number in range(lines))


@dataclass(slots=True)
class Place:
    """A blob in its pack."""

    id: BlobId
    path: Path
    offset: int
    entry: BlobEntry

    @property
    def payload(self) -> int:
        return self.offset + HEADER_BYTES


class Sample:
    """A real repository with two snapshots of a VM, one of another, and small packs. ``open`` gives a new look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = FakeClock()
        first = disk_bytes(1, 900, zero_every=3, tail=700) + text(1, 4000) + disk_bytes(2, 300)
        second = first[:8192] + disk_bytes(3, 20) + first[8192 + 20 * 4096 :]
        self.contents: list[Content] = [
            {DISK: first, CONFIG: text(5, 100)},
            {DISK: second, CONFIG: text(6, 100)},
        ]
        self.other: Content = {DISK: disk_bytes(9, 300), CONFIG: text(7, 100)}

    def create(self) -> None:
        with Repository.create(str(self.root), clock=self.clock) as made:
            small = encode_config(replace(made.config, pack_bytes=2**20))
            for path in (made.layout.config_backup, made.layout.config):
                write_durably(RealFileSystem(), path, small, replace=True)
        with self.open() as repository:
            for content in self.contents:
                self.back_up(repository, content)
            self.back_up(repository, self.other, OTHER_VM)

    def open(self) -> Repository:
        return Repository.open(str(self.root), clock=self.clock)

    def back_up(self, repository: Repository, content: Content, vm: VmName = VM) -> Snapshot:
        self.clock.pass_time(60)
        return backup(LocalPeer(repository), request(content, vm), clock=self.clock)

    @property
    def first(self) -> bytes:
        return self.contents[0][DISK]

    def place(self, repository: Repository, blob_id: BlobId) -> Place:
        entry = repository.store.entries([blob_id])[blob_id]
        pack = repository.store.pack_rows()[entry.pack].pack
        return Place(blob_id, self.root / "packs" / pack[:2] / f"{pack}.pack", entry.offset, entry)

    def expected(self, number: int) -> Content:
        return [*self.contents, self.other][number]

    def verify(self, repository: Repository) -> None:
        """All is as if nothing had happened."""
        report = check(repository, FULL)
        assert not report.damaged, report.findings
        assert not report.affected
        for content, snapshot in zip([*self.contents, self.other], self.snapshots(repository), strict=True):
            assert contents(repository, snapshot) == content

    def snapshots(self, repository: Repository) -> list[Snapshot]:
        """The first ones, in the order in which they were made."""
        return [*repository.catalog.all(vm=VM)[:2], *repository.catalog.all(vm=OTHER_VM)[:1]]

    def heal(self) -> None:
        """Back everything up again; then all is well, also after a gc."""
        with self.open() as repository:
            for number in range(2):
                self.back_up(repository, self.contents[number])
            self.back_up(repository, self.other, OTHER_VM)
            self.verify(repository)
            with repository.maintenance():
                execute_gc(repository, plan_gc(repository))
            self.verify(repository)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    sample = Sample(tmp_path_factory.mktemp("golden") / "repository")
    sample.create()
    return sample


@pytest.fixture
def sample(golden: Sample, tmp_path: Path) -> Sample:
    """A copy of the golden one, to be damaged."""
    copy = Sample(tmp_path / "repository")
    shutil.copytree(golden.root, copy.root)
    copy.clock = FakeClock(golden.clock.now_ms() + 60_000)
    return copy


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


# --- what is in the packs


def root_node(repository: Repository, snapshot: Snapshot) -> Inner:
    node = decode_node(repository.store.read(snapshot.manifest.disks[0].root))
    assert isinstance(node, Inner)
    return node


def leaf_node(repository: Repository, snapshot: Snapshot, number: int) -> Leaf:
    node = decode_node(repository.store.read(root_node(repository, snapshot).children[number]))
    assert isinstance(node, Leaf)
    return node


def chunks(repository: Repository, snapshot: Snapshot, *, compressed: bool) -> list[Extent]:
    """Chunks of the first segments that are or are not compressed."""
    found = [e for n in range(2) for e in leaf_node(repository, snapshot, n).extents if not e.is_zero]
    entries = repository.store.entries([extent.id for extent in found])
    return [e for e in found if bool(entries[e.id].flags) == compressed]


def plain_chunk(repository: Repository, snapshot: Snapshot) -> BlobId:
    return chunks(repository, snapshot, compressed=False)[5].id


def compressed_chunk(repository: Repository, snapshot: Snapshot) -> BlobId:
    return chunks(repository, snapshot, compressed=True)[0].id


def a_leaf(repository: Repository, snapshot: Snapshot) -> BlobId:
    return root_node(repository, snapshot).children[1]


def a_root(repository: Repository, snapshot: Snapshot) -> BlobId:
    return snapshot.manifest.disks[0].root


def a_config(repository: Repository, snapshot: Snapshot) -> BlobId:
    return snapshot.manifest.configs[0].id


Choice = Callable[[Repository, Snapshot], BlobId]


def ranges_of(repository: Repository, content: bytes, snapshot: Snapshot, lost: BlobId) -> list[Range]:
    """Which bytes of the disk are lost with a blob: found by looking for the chunk's bytes in the disk."""
    if lost == snapshot.manifest.disks[0].root:
        return [Range(0, len(content))]
    root = decode_node(repository.store.read(snapshot.manifest.disks[0].root))
    if isinstance(root, Inner) and lost in root.children:
        start = root.children.index(lost) * SEGMENT_BYTES
        return [Range(start, min(SEGMENT_BYTES, len(content) - start))]
    if repository.store.entries([lost])[lost].kind != 1:
        return []
    plain = bytes(repository.store.read(lost))
    at = content.find(plain)
    return [] if at < 0 else [Range(at, len(plain))]


def without(content: bytes, lost: list[Range]) -> bytes:
    rest = bytearray(content)
    for start, length in lost:
        rest[start : start + length] = bytes(length)
    return bytes(rest)


def assert_restores_fail_or_are_right(
    sample: Sample, repository: Repository, expected: list[list[Range]], *, must_fail: bool
) -> None:
    """Strict restores never give wrong bytes; best-effort ones lose exactly what is expected, and say so."""
    peer = LocalPeer(repository)
    for number, snapshot in enumerate(sample.snapshots(repository)):
        content = bytes(sample.expected(number)[DISK])
        (disk,) = snapshot.manifest.disks
        target = MemoryDevice(b"\xff" * disk.size_bytes)
        if expected[number] and must_fail:
            with pytest.raises(DataDamage):
                restore_disk(peer, disk, target)
        else:
            with suppress(DataDamage):
                restore_disk(peer, disk, target)
                assert target.content() == content
        target = MemoryDevice(b"\xff" * disk.size_bytes)
        report = restore_disk(peer, disk, target, RestoreOptions(best_effort=True))
        if must_fail or report.lost:
            assert report.lost == expected[number]
            assert bool(report.reasons) == bool(report.lost)
        assert target.content() == without(content, report.lost)
        for config in snapshot.manifest.configs:
            with suppress(DataDamage):
                assert read_config(peer, config) == sample.expected(number)[config.name]


def assert_affected(sample: Sample, repository: Repository, report: CheckReport, expected: list[list[Range]]) -> None:
    """The report names snapshots, disks and ranges."""
    named = {(a.snapshot.id, a.disk): list(a.ranges) for a in report.affected if a.disk is not None}
    wanted = {(s.id, DISK): e for s, e in zip(sample.snapshots(repository), expected, strict=True) if e}
    assert named == wanted


HEADER_FIELDS = {"magic": 1, "kind": 4, "flags": 5, "reserved": 6, "stored": 9, "plain": 12, "id": 20, "checksum": 50}
SURE_TO_FAIL = {"magic", "stored", "id"}


@pytest.mark.parametrize(
    ("choose", "field"),
    [
        pytest.param(choose, field, marks=[] if choose is plain_chunk or field == "id" else pytest.mark.slow)
        for choose in (plain_chunk, a_leaf, a_root, a_config)
        for field in HEADER_FIELDS
    ],
)
def test_a_bit_of_a_records_header(sample: Sample, choose: Choice, field: str) -> None:
    with sample.open() as repository:
        snapshot = sample.snapshots(repository)[0]
        place = sample.place(repository, choose(repository, snapshot))
        expected = [
            ranges_of(repository, bytes(sample.expected(n)[DISK]), s, place.id)
            for n, s in enumerate(sample.snapshots(repository))
        ]
    flip(place.path, place.offset + HEADER_FIELDS[field])
    damage_and_heal(sample, place, expected, must_fail=field in SURE_TO_FAIL)


@pytest.mark.parametrize("choose", [plain_chunk, compressed_chunk, a_leaf, a_root, a_config])
@pytest.mark.parametrize(
    "where", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(0.999, marks=pytest.mark.slow)]
)
def test_a_bit_of_a_records_payload(sample: Sample, choose: Choice, where: float) -> None:
    with sample.open() as repository:
        snapshot = sample.snapshots(repository)[0]
        place = sample.place(repository, choose(repository, snapshot))
        expected = [
            ranges_of(repository, bytes(sample.expected(n)[DISK]), s, place.id)
            for n, s in enumerate(sample.snapshots(repository))
        ]
    flip(place.path, place.payload + int(where * place.entry.stored_length), bit=3)
    damage_and_heal(sample, place, expected, must_fail=not place.entry.flags)


def damage_and_heal(sample: Sample, place: Place, expected: list[list[Range]], *, must_fail: bool) -> None:
    untouched = sample.root.with_name("to-repair")
    shutil.copytree(sample.root, untouched)
    with sample.open() as repository:
        assert_restores_fail_or_are_right(sample, repository, expected, must_fail=must_fail)
        assert_found(sample, repository, place, expected)
        assert check(repository).damaged, "it is remembered"
    sample.heal()
    sample.root = untouched
    assert_repaired(sample, place, expected)
    sample.heal()


def assert_found(sample: Sample, repository: Repository, place: Place, expected: list[list[Range]]) -> None:
    report = check(repository, FULL)
    assert report.damaged
    assert any(place.id.hex()[:16] in finding.object for finding in report.findings), report.findings
    if any(expected):
        assert_affected(sample, repository, report, expected)
    else:
        named = [(a.snapshot.id, a.disk, a.config) for a in report.affected]
        users = [s for s in sample.snapshots(repository) if place.id in {config.id for config in s.manifest.configs}]
        assert users
        assert named == [(s.id, None, CONFIG) for s in users]


def assert_repaired(sample: Sample, place: Place, expected: list[list[Range]]) -> None:
    """Without a second copy the blob is lost, and nothing else; its pack is put aside."""
    with sample.open() as repository:
        check(repository, FULL)
        done = repair(repository)
        assert done.lost_blobs == 1
        assert done.healed_blobs == 0
        assert [Path(path).name for path in done.quarantined] == [place.path.name]
        assert (sample.root / "quarantine" / place.path.name).exists()
        assert place.path.name not in {path.name for path in pack_paths(sample)}
        report = check(repository, FULL)
        assert_affected(sample, repository, report, expected)
        assert_restores_fail_or_are_right(sample, repository, expected, must_fail=True)


# --- the frame of a pack


def pack_paths(sample: Sample) -> list[Path]:
    return sorted((sample.root / "packs").glob("*/*.pack"), key=lambda path: (path.stat().st_size, path.name))


def footer_offset(path: Path) -> int:
    trailer = path.read_bytes()[-TRAILER_BYTES:]
    return int.from_bytes(trailer[16:24], "little")


FRAME = {
    "header magic": lambda path: 0,
    "header pack id": lambda path: 20,
    "header session": lambda path: 40,
    "header checksum": lambda path: CHECKED_BYTES,
    "footer's first entry": lambda path: footer_offset(path) + 1,
    "footer's id": lambda path: footer_offset(path) + ENTRY_BYTES + 20,
    "trailer magic": lambda path: path.stat().st_size - TRAILER_BYTES,
    "trailer count": lambda path: path.stat().st_size - TRAILER_BYTES + 8,
    "trailer offset": lambda path: path.stat().st_size - TRAILER_BYTES + 16,
    "trailer checksum": lambda path: path.stat().st_size - 1,
}


@pytest.mark.parametrize("where", FRAME)
def test_a_bit_of_a_packs_frame_costs_nothing(sample: Sample, where: str) -> None:
    """Header and footer repeat what records say: all data stays, with and without the index."""
    path = pack_paths(sample)[-1]
    flip(path, FRAME[where](path))
    with sample.open() as repository:
        sample.verify(repository)
    report = rebuild_index(str(sample.root))
    assert any(path.stem in note for note in report.notes) == (not where.startswith("header"))
    with sample.open() as repository:
        sample.verify(repository)


@pytest.mark.parametrize("where", FRAME)
def test_a_bit_of_a_packs_frame_is_found(sample: Sample, where: str) -> None:
    path = pack_paths(sample)[-1]
    flip(path, FRAME[where](path))
    with sample.open() as repository:
        assert any(path.stem in finding.object + finding.message for finding in check(repository, FULL).findings)


@pytest.mark.parametrize("kept", [0.0, 0.5, None])
@pytest.mark.parametrize("which", [0, -1])
def test_a_deleted_or_truncated_pack(sample: Sample, kept: float | None, which: int) -> None:
    path = pack_paths(sample)[which]
    if kept is None:
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
    untouched = sample.root.with_name("to-repair")
    shutil.copytree(sample.root, untouched)
    with sample.open() as repository:
        for options in (CheckOptions(), FULL):
            report = check(repository, options)
            assert any(path.stem in finding.object for finding in report.findings), report.findings
            assert report.affected
        assert_lost_as_reported(sample, repository, report)
    sample.heal()
    sample.root = untouched
    with sample.open() as repository:
        before = check(repository, FULL)
        done = repair(repository)
        assert done.lost_blobs > 0
        assert bool(done.quarantined) == (kept is not None)
        report = check(repository, FULL)
        assert {(a.snapshot.id, a.disk, a.config, a.ranges) for a in report.affected} == {
            (a.snapshot.id, a.disk, a.config, a.ranges) for a in before.affected
        }
        assert_lost_as_reported(sample, repository, report)
    sample.heal()


def assert_lost_as_reported(sample: Sample, repository: Repository, report: CheckReport) -> None:
    reported = {a.snapshot.id: list(a.ranges) for a in report.affected if a.disk is not None}
    expected = [reported.get(s.id, []) for s in sample.snapshots(repository)]
    assert all(list(merged(ranges)) == ranges for ranges in expected)
    assert_restores_fail_or_are_right(sample, repository, expected, must_fail=True)


def test_a_pack_is_lost_without_the_index(sample: Sample) -> None:
    """After a rebuild nobody knows of the pack, but the snapshots know what they need."""
    path = pack_paths(sample)[-1]
    path.unlink()
    rebuild_index(str(sample.root))
    with sample.open() as repository:
        report = check(repository, FULL)
        assert report.damaged
        assert_lost_as_reported(sample, repository, report)
        with repository.maintenance(), suppress(CasbackupError):  # it may refuse, but must not delete what is left
            execute_gc(repository, plan_gc(repository))
        assert_lost_as_reported(sample, repository, check(repository, FULL))
    sample.heal()


def test_repair_finds_another_copy(sample: Sample) -> None:
    with sample.open() as repository:
        place = sample.place(repository, plain_chunk(repository, sample.snapshots(repository)[0]))
        good = place.path.read_bytes()
    flip(place.path, place.payload + 7)
    with sample.open() as repository:
        assert check(repository, FULL).damaged
    place.path.write_bytes(good)
    with sample.open() as repository:
        done = repair(repository)
        assert done.healed_blobs == 1
        assert done.lost_blobs == 0
        assert not done.quarantined
        sample.verify(repository)


def test_foreign_files_among_the_packs(sample: Sample) -> None:
    strange = "00" * 16
    names = ["notes.txt", "ab/README", f"ab/{strange}.pack", "ab/x.pack.tmp"]
    for name in names:
        path = sample.root / "packs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"this is no pack")
    with sample.open() as repository:
        report = check(repository, FULL)
        assert not report.damaged
        assert {f.object for f in report.findings if f.severity == "note"} == set(names)
        sample.verify(repository)
    sample.heal()
    assert all((sample.root / "packs" / name).exists() for name in names), "gc deletes only packs"
    rebuild_index(str(sample.root))
    with sample.open() as repository:
        sample.verify(repository)


def test_something_that_is_named_like_a_pack(sample: Sample) -> None:
    """It is an orphan for gc, and nothing for anybody else."""
    path = sample.root / "packs" / "00" / f"{'00' * 16}.pack"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"this is no pack" * 1000)
    with sample.open() as repository:
        sample.verify(repository)
    rebuild_index(str(sample.root))
    with sample.open() as repository:
        sample.verify(repository)
        with repository.maintenance():
            execute_gc(repository, plan_gc(repository))
        sample.verify(repository)
    assert not path.exists()


# --- manifests


def manifests(sample: Sample, vm: VmName = VM) -> list[Path]:
    return sorted((sample.root / "snapshots" / "default" / vm).glob("*.snap"))


@pytest.mark.parametrize("offset", [0, 12, 100, -1])
def test_a_bit_of_a_manifest(sample: Sample, offset: int) -> None:
    path = manifests(sample)[1]
    good = path.read_bytes()
    flip(path, offset % len(good))
    damaged = path.read_bytes()
    with sample.open() as repository:
        report = check(repository)
        assert [finding.object for finding in report.findings] == [str(path)]
        assert report.damaged
        done = repair(repository)
        assert done.restored_manifests == 1
        assert path.read_bytes() == good
        sample.verify(repository)
    path.write_bytes(damaged)
    rebuild_index(str(sample.root))  # the copy is gone with the old index
    with sample.open() as repository:
        assert check(repository).damaged
        with pytest.raises(ManifestDamaged):
            repository.catalog.find(VM)
        with pytest.raises(ManifestDamaged):
            repository.catalog.all()
        with pytest.raises(ManifestDamaged):
            plan_gc(repository)
        assert [s.manifest.vm for s in repository.catalog.survey()[0]] == [VM, OTHER_VM]
        assert contents(repository, repository.catalog.find(OTHER_VM)) == sample.other
        done = repair(repository)
        assert done.restored_manifests == 0
        assert any(str(path) in note for note in done.notes)
        made = sample.back_up(repository, sample.contents[1])
        assert contents(repository, made) == sample.contents[1]
    path.write_bytes(good)
    with sample.open() as repository:
        sample.verify(repository)


def test_a_manifest_in_the_folder_of_another_vm(sample: Sample) -> None:
    source = manifests(sample)[0]
    target = sample.root / "snapshots" / "default" / OTHER_VM / source.name
    source.rename(target)
    with sample.open() as repository:
        report = check(repository, FULL)
        assert [finding.object for finding in report.findings if finding.severity == "damage"] == [str(target)]
        with pytest.raises(ManifestDamaged):
            repository.catalog.find(OTHER_VM)
        with pytest.raises(ManifestDamaged):
            plan_gc(repository)
        assert contents(repository, repository.catalog.find(VM)) == sample.contents[1]
        done = repair(repository)
        assert done.restored_manifests == 0
        assert any(str(target) in note for note in done.notes)
    target.rename(source)
    with sample.open() as repository:
        sample.verify(repository)


def test_a_damaged_sidecar(sample: Sample) -> None:
    with sample.open() as repository:
        repository.catalog.annotate(sample.snapshots(repository)[0], labels=["keep"], notes="a note")
    (path,) = sample.root.glob("snapshots/default/vm/100/*.meta")
    good = path.read_bytes()
    for offset in (0, 4, good.index(b"false"), good.index(b"[") + 4, len(good) - 2):
        path.write_bytes(good)
        flip(path, offset, bit=5)
        with sample.open() as repository:
            report = check(repository)
            assert report.damaged
            assert path.stem in report.findings[0].object
            assert repository.catalog.all(vm=VM)[0].pinned, "it may have been a pin"
            repair(repository)
            assert repository.catalog.all(vm=VM)[0].pinned
            sample.verify(repository)


# --- config.json


def test_every_byte_of_the_config(sample: Sample) -> None:
    """It has no checksum: a bit may change a number unseen. Opening fails, or all snapshots are what they were."""
    path = sample.root / "config.json"
    good = path.read_bytes()
    refused: list[int] = []
    for offset in range(len(good)):
        path.write_bytes(good)
        flip(path, offset, bit=offset % 7)
        try:
            repository = sample.open()
        except CasbackupError:
            refused.append(offset)
            continue
        with repository:
            snapshot = repository.catalog.find(OTHER_VM)
            assert contents(repository, snapshot) == sample.other
    assert len(refused) > len(good) // 2
    path.write_bytes(good)
    flip(path, 0)
    with pytest.raises(ConfigDamaged):
        sample.open()
    report = rebuild_index(str(sample.root))
    assert any("config.json" in note for note in report.notes)
    assert path.read_bytes() == good
    with sample.open() as repository:
        sample.verify(repository)
    sample.heal()


# --- the index


def truncated(kept: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])

    return change


def garbage(start: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        first = int(len(data) * start) // 4096 * 4096
        path.write_bytes(data[:first] + disk_bytes(99, (len(data) - first) // 4096))

    return change


OPEN_AND_CHECK = """
import sys
from casbackup.errors import CasbackupError
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
try:
    with Repository.open(sys.argv[1]) as repository:
        print("damaged" if check(repository, CheckOptions(read_data=True)).damaged else "clean")
except CasbackupError as error:
    print(error.code)
"""


def try_check(root: Path) -> tuple[int, str]:
    """In a process of its own: LMDB reads by a memory map, and that can end in a signal."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AND_CHECK, str(root)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(truncated(0), id="empty"),
        pytest.param(truncated(0.01), id="hardly-anything"),
        pytest.param(truncated(0.3), id="truncated-30"),
        pytest.param(truncated(0.6), id="truncated-60"),
        pytest.param(garbage(0), id="garbage"),
        pytest.param(garbage(0.2), id="garbage-after-20"),
        pytest.param(garbage(0.7), id="garbage-after-70"),
    ],
)
def test_a_damaged_index(sample: Sample, change: Callable[[Path], None]) -> None:
    change(sample.root / "index" / "data.mdb")
    assert try_check(sample.root) in [(0, "index-damaged"), (0, "index-missing")]
    assert_rebuilt(sample)


def test_a_deleted_index(sample: Sample) -> None:
    (sample.root / "index" / "data.mdb").unlink()
    with pytest.raises(IndexMissing):
        sample.open()
    assert_rebuilt(sample)
    shutil.rmtree(sample.root / "index")
    with pytest.raises(IndexMissing):
        sample.open()
    assert_rebuilt(sample)


def test_an_index_of_garbage(sample: Sample) -> None:
    garbage(0)(sample.root / "index" / "data.mdb")
    with pytest.raises(IndexDamaged):
        sample.open()
    assert_rebuilt(sample)


def assert_rebuilt(sample: Sample) -> None:
    rebuild_index(str(sample.root))
    with sample.open() as repository:
        sample.verify(repository)
