"""Two repositories, and what tests of copying between them need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from casbackup.clock import Clock
from casbackup.codec.master_key import MasterKey
from casbackup.ids import DEFAULT_NAMESPACE, Namespace, VmName
from casbackup.jobs.backup import BackupRequest, backup
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_plan import SnapshotFilter
from casbackup.jobs.sync_report import SyncReport
from casbackup.peer.local import LocalPeer
from casbackup.peer.sealed import SealedPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.repository import Repository
from casbackup.spec.config import ChunkerConfig
from casbackup.testing.clock import FakeClock
from casbackup.testing.world import VM, contents, disk_bytes, request, restored


@dataclass
class Site:
    """A repository with a clock of its own."""

    repository: Repository
    clock: FakeClock

    @property
    def peer(self) -> LocalPeer:
        return LocalPeer(self.repository)

    @property
    def ids(self) -> list[str]:
        return [snapshot.id for snapshot in self.repository.catalog.all()]

    def backup(self, content: Mapping[str, bytes], vm: VmName = VM, **fields: object) -> Snapshot:
        """Back up, a minute after what was done before."""
        self.clock.pass_time(60)
        namespace = fields.pop("namespace", DEFAULT_NAMESPACE)
        asked = request(content, vm, **fields)
        values = {name: getattr(asked, name) for name in BackupRequest.__slots__}
        return backup(self.peer, BackupRequest(**{**values, "namespace": namespace}), clock=self.clock)

    def gc(self) -> None:
        with self.repository.maintenance():
            execute_gc(self.repository, plan_gc(self.repository, repack_garbage=0.01))

    def require_sound(self) -> None:
        report = check(self.repository, CheckOptions(read_data=True))
        assert not report.findings, report.findings

    def content(self, snapshot_id: str) -> Mapping[str, bytes]:
        (snapshot,) = [s for s in self.repository.catalog.all() if s.id == snapshot_id]
        return contents(self.repository, snapshot)


@dataclass
class SealedSite(Site):
    """An encrypted repository, and somebody who has its key. Without it, it is a ``Site`` as any other."""

    key: MasterKey

    @property
    def opened(self) -> SealedPeer:
        return SealedPeer(self.peer, self.key)

    def backup(self, content: Mapping[str, bytes], vm: VmName = VM, **fields: object) -> Snapshot:
        self.clock.pass_time(60)
        return backup(self.opened, request(content, vm, **fields), clock=self.clock)

    def restored(self, snapshot_id: str) -> Mapping[str, bytes]:
        (snapshot,) = [s for s in self.opened.snapshots() if s.id == snapshot_id]
        return restored(self.opened, snapshot)


def sealed_site(folder: Path, key: MasterKey, clock: Clock | None = None) -> SealedSite:
    made = site(folder, clock, key_fingerprint=key.fingerprint)
    return SealedSite(made.repository, made.clock, key)


@dataclass
class Pair:
    """Two sites, the first of which is the source."""

    here: Site
    there: Site

    def sync(self, *, back: bool = False, mirror: bool = False, dry_run: bool = False, **chosen: object) -> SyncReport:
        ends = (self.there.peer, self.here.peer) if back else (self.here.peer, self.there.peer)
        return sync(*ends, SyncRequest(SnapshotFilter(**chosen), mirror, dry_run))  # type: ignore[arg-type]

    def require_equal(self) -> None:
        """Both have the same snapshots, whole, and no damage."""
        assert self.here.ids == self.there.ids
        for snapshot in self.here.repository.catalog.all():
            assert self.here.content(snapshot.id) == self.there.content(snapshot.id)
        self.there.require_sound()
        self.here.require_sound()


def site(folder: Path, clock: Clock | None = None, **settings: object) -> Site:
    made = FakeClock() if clock is None else clock
    return Site(Repository.create(str(folder), clock=made, **settings), made)  # type: ignore[arg-type]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    here, there = site(tmp_path / "here"), site(tmp_path / "there")
    yield Pair(here, there)
    here.repository.close()
    there.repository.close()


@pytest.fixture
def other_chunks(tmp_path: Path) -> Iterator[Site]:
    """A repository that cuts and compresses in another way."""
    made = site(tmp_path / "other", chunker=ChunkerConfig(min_blocks=2, max_blocks=16), compression_level=9)
    yield made
    made.repository.close()


DISK = disk_bytes(1, 3000, zero_every=3, tail=700)
"""Three segments, some of it zero."""
ACME = Namespace("acme/prod")
OTHER_VM = VmName("vm/web01")
