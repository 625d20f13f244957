"""Uses the repository named on the command line, as a process of its own, to be killed.

    driver.py ROOT backup VM SEED ROUND     one backup
    driver.py ROOT backups VM SEED COUNT    one after the other
    driver.py ROOT gc | forget-gc           once; the latter keeps the last two snapshots of each VM
    driver.py ROOT gc-loop                  both, again and again, until standard input ends
    driver.py ROOT read-loop                restores what was there at the beginning until standard input ends

Prints ``ready`` when all is imported, and ``done`` at the end. What a snapshot must contain is computed from its
notes alone: VM, seed and round.
"""

from __future__ import annotations

import contextlib
import functools
import random
import select
import sys
from collections.abc import Sequence

from casbackup.block.memory import MemoryDevice
from casbackup.clock import SystemClock
from casbackup.errors import RepositoryBusy, SnapshotNotFound
from casbackup.ids import DEFAULT_NAMESPACE, VmName, parse_disk
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.restore import RestoreOptions, read_config, restore_disk
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.gc import GcReport, execute_gc, plan_gc
from casbackup.repository.repository import Repository

GROUP_BYTES = 256 * 1024
KEEP = 2
VM = VmName("vm/100")


class LateClock(SystemClock):
    """A day later, so that gc gives up the sessions of killed backups."""

    def now_ms(self) -> int:
        return super().now_ms() + 25 * 3600 * 1000


@functools.lru_cache(maxsize=6)
def image(vm: str, seed: int, number: int) -> bytes:
    """10 to 30 MiB in groups that are random or zero. Each round writes a sixth of them anew.

    Most groups are the same for all VMs of a seed.
    """
    groups = random.Random(f"size {seed}").randint(40, 120)
    versions = [0] * groups
    for later in range(1, number + 1):
        source = random.Random(f"change {seed} {later}")
        for _ in range(groups // 6):
            versions[source.randrange(groups)] = later
    parts: list[bytes] = []
    for group, version in enumerate(versions):
        owner = vm if group % 8 == 0 else "shared"
        source = random.Random(f"{owner} {seed} {group} {version}")
        parts.append(bytes(GROUP_BYTES) if source.random() < 0.3 else source.randbytes(GROUP_BYTES))
    return b"".join(parts) + b"a tail"


def config_of(notes: str) -> bytes:
    return f"notes: {notes}\n".encode()


def back_up(repository: Repository, vm: VmName, seed: int, number: int) -> Snapshot:
    notes = f"{vm} {seed} {number}"
    disk = DiskInput(parse_disk("scsi0"), DeviceSegments(MemoryDevice(image(vm, seed, number))))
    request = BackupRequest(DEFAULT_NAMESPACE, vm, [disk], {"qemu-server.conf": config_of(notes)}, notes=notes)
    return backup(LocalPeer(repository), request)


def verify_snapshot(repository: Repository, snapshot: Snapshot) -> None:
    """It restores to the bytes that its notes promise."""
    peer = LocalPeer(repository)
    vm, seed, number = snapshot.notes.split()
    (disk,) = snapshot.manifest.disks
    target = MemoryDevice(disk.size_bytes)
    restore_disk(peer, disk, target, RestoreOptions(target_is_zero=True))
    assert target.content() == image(vm, int(seed), int(number)), f"{snapshot.reference} is not what was backed up"
    assert [read_config(peer, config) for config in snapshot.manifest.configs] == [config_of(snapshot.notes)]


def collect(root: str) -> GcReport:
    with Repository.open(root, clock=LateClock()) as repository, repository.maintenance():
        return execute_gc(repository, plan_gc(repository))


def forget(repository: Repository) -> None:
    """All but the last few of each VM."""
    by_vm: dict[VmName, list[Snapshot]] = {}
    for snapshot in repository.catalog.all():
        by_vm.setdefault(snapshot.manifest.vm, []).append(snapshot)
    repository.catalog.remove([s for snapshots in by_vm.values() for s in snapshots[:-KEEP]])


def stopped() -> bool:
    """Has the parent closed standard input?"""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def gc_loop(root: str) -> None:
    rounds = 0
    while not stopped() or rounds < 2:
        with Repository.open(root) as repository:
            forget(repository)
        try:
            collect(root)
        except RepositoryBusy:
            continue
        rounds += 1


def read_loop(root: str) -> None:
    with Repository.open(root) as repository:
        snapshots = repository.catalog.all()
        peer = LocalPeer(repository)
        rounds = 0
        while not stopped() or rounds < 2:
            for snapshot in snapshots:
                # It may go before it is held.
                with contextlib.suppress(SnapshotNotFound), peer.reading(snapshot):
                    verify_snapshot(repository, snapshot)
            rounds += 1
        if not snapshots:
            raise SnapshotNotFound("there was nothing to read")


def main(root: str, action: str, rest: Sequence[str]) -> None:
    if action in ("backup", "backups"):
        vm, seed, number = VmName(rest[0]), int(rest[1]), int(rest[2])
        with Repository.open(root) as repository:
            for each in range(1, number + 1) if action == "backups" else [number]:
                back_up(repository, vm, seed, each)
    elif action == "gc":
        collect(root)
    elif action == "forget-gc":
        with Repository.open(root) as repository:
            forget(repository)
        collect(root)
    elif action == "gc-loop":
        gc_loop(root)
    elif action == "read-loop":
        read_loop(root)
    else:
        raise SystemExit(f"unknown action {action}")


if __name__ == "__main__":
    print("ready", flush=True)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    print("done", flush=True)
