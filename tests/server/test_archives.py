"""Imports and exports against a server do what they do against a folder."""

from __future__ import annotations

from casbackup.errors import ArchiveIncomplete
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead
from casbackup.formats.qcow2 import FORMAT as QCOW2
from casbackup.formats.vma import FORMAT as VMA
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.export import export, plan_export
from casbackup.jobs.import_ import ImportRequest, import_archive
from casbackup.peer.api import Peer
from casbackup.repository.catalog import Snapshot
from casbackup.testing.archives import MemorySource, MemoryTarget, Sample, mixed_bytes, write_archive
from casbackup.units import MiB

from .conftest import Running

REQUEST = ImportRequest(DEFAULT_NAMESPACE, VmName("vm/100"), "vma")
CONTENT = Sample(
    ArchiveHead((ArchiveDisk("drive-scsi0", 9 * MiB + 512, 3),), (ArchiveConfig("a.conf", b"a"),), bytes(16), 77),
    (mixed_bytes(9 * MiB + 512),),
)


def exported(peer: Peer, snapshot: Snapshot, archive_format=VMA) -> bytes:  # type: ignore[no-untyped-def]
    writer, target = archive_format.writer(), MemoryTarget(seekable=False)
    export(peer, plan_export(peer, snapshot, archive_format.name), writer, target)
    return bytes(target.data)


def test_an_archive_goes_in_and_comes_out(running: Running) -> None:
    data = write_archive(VMA.writer(), CONTENT, seed=3)
    with running.peer() as peer:
        imported = import_archive(peer, VMA.reader().open(MemorySource(data, seekable=False)), REQUEST).snapshot  # type: ignore[misc]
        found = peer.find("vm/100", DEFAULT_NAMESPACE)
        assert found.manifest.archive == imported.manifest.archive is not None
        for archive_format in (VMA, QCOW2):
            assert exported(peer, found, archive_format) == exported(running.local(), found, archive_format)
        again = import_archive(peer, VMA.reader().open(MemorySource(exported(peer, found))), REQUEST)  # type: ignore[misc]
    assert again.snapshot.manifest.stats.new_chunks == 0
    assert again.snapshot.manifest.disks[0].root == imported.manifest.disks[0].root


def test_what_is_not_whole_is_not_committed(running: Running) -> None:
    class Empty:
        head = CONTENT.head

        def events(self):  # type: ignore[no-untyped-def]
            return iter(())

    with running.peer() as peer:
        try:
            import_archive(peer, Empty(), REQUEST)
        except ArchiveIncomplete:
            assert peer.snapshots() == []
        else:
            raise AssertionError("it was committed")
