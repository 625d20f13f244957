"""Where ``restore`` writes to: from the command line and the snapshot to places, and from places to open
targets.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from casbackup.errors import DuplicateDisk, TargetExists, TargetUnsuitable, TargetUnwritable, UsageError
from casbackup.units import MiB

if TYPE_CHECKING:
    from casbackup.block.target import Target
    from casbackup.repository.catalog import Snapshot
    from casbackup.spec.manifest import ConfigRecord, DiskRecord

_SUFFIXES = {"qcow2": ".qcow2", "vmdk": ".vmdk", "vhdx": ".vhdx", "vdi": ".vdi", "vpc": ".vhd"}
FORMATS = ("raw", *_SUFFIXES)
"""What ``--format`` may be."""

STATE_SUFFIX = ".bin"
"""Of the VM's memory in a folder: it is a stream, and no image of a disk."""

_LOOK_BYTES = 1 * MiB
"""Partition tables, file systems, LVM and RAID have their marks within this of a device's beginning or end.
"""


class DiskPlace(NamedTuple):
    disk: DiskRecord
    path: str
    image_format: str


class ConfigPlace(NamedTuple):
    config: ConfigRecord
    path: str


class Places(NamedTuple):
    """All that a restore will write."""

    folder: str | None
    disks: list[DiskPlace]
    configs: list[ConfigPlace]

    def paths(self) -> list[str]:
        return [place.path for place in self.disks] + [place.path for place in self.configs]


class Overwriting(NamedTuple):
    """What may happen to what is there: replaced (``force``), or changed where it differs (``in_place``)."""

    force: bool
    in_place: bool


def plan(
    snapshot: Snapshot, folder: str | None, disks: Sequence[str], image_format: str | None, vmstate: str | None = None
) -> Places:
    """What goes where. ``disks`` are ``NAME=PATH`` or ``NAME``; without any, all disks and configs go to
    ``folder``. ``vmstate``: a path for the VM's memory.

    :raise UsageError: when a place is missing or named twice. :raise SnapshotNotFound: for a disk that is
    not there. :raise VmStateMissing: for memory that is not there.
    """
    if folder is None and not disks and vmstate is None:
        raise UsageError("where to? Give --to FOLDER, or --disk NAME=TARGET")
    names = list(disks)
    if folder is not None and not disks:
        names = [disk.name for disk in snapshot.manifest.disks if not (disk.role and vmstate)]
    chosen = _chosen(snapshot, folder, names, image_format)
    if vmstate is not None:
        chosen.append(_state_place(snapshot, vmstate))
    configs = [] if disks or folder is None else list(snapshot.manifest.configs)
    places = Places(folder, chosen, [ConfigPlace(c, os.path.join(folder or "", c.name)) for c in configs])
    paths = [os.path.realpath(path) for path in places.paths()]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"two things would be written to {path}; restore disks one by one with --disk NAME=TARGET")
    return places


def _state_place(snapshot: Snapshot, path: str) -> DiskPlace:
    from casbackup.jobs.restore import find_vmstate

    state = find_vmstate(snapshot)
    if path == "-":
        raise UsageError(
            f"--vmstate takes a file; for standard output: casbackup dump {snapshot.reference} {state.name}"
        )
    return DiskPlace(state, path, "raw")


def _chosen(snapshot: Snapshot, folder: str | None, disks: Sequence[str], image_format: str | None) -> list[DiskPlace]:
    from casbackup.jobs.restore import find_disk

    places: list[DiskPlace] = []
    for text in disks:
        name, _, path = text.partition("=")
        disk = find_disk(snapshot, name)
        if any(disk.name == place.disk.name for place in places):
            raise DuplicateDisk(f"disk {name} is given twice")
        if not path and folder is None:
            raise UsageError(f"where should {name} go? Give --disk {name}=TARGET, or --to FOLDER")
        used_format = "raw" if disk.role else image_format or _format_of_name(path) or "raw"
        suffix = STATE_SUFFIX if disk.role else _SUFFIXES.get(used_format, ".raw")
        path = path or os.path.join(folder or "", name + suffix)
        places.append(DiskPlace(disk, path, used_format))
    return places


def _format_of_name(path: str) -> str | None:
    """A file named ``x.qcow2`` that holds something else would be taken for a damaged image by everybody."""
    suffix = os.path.splitext(path)[1].lower()
    return next((name for name, known in _SUFFIXES.items() if known == suffix), None)


@contextlib.contextmanager
def opened(places: Places, overwriting: Overwriting) -> Iterator[list[Target]]:
    """All targets of disks, open. Whatever is wrong with any of them is found before the first byte is
    written.

    Those not committed at the end are aborted: new files vanish, files to be replaced stay as they were.

    :raise TargetError: when one cannot be used.
    """
    if places.folder is not None:
        _make_folder(places.folder)
    for place in places.configs:
        _check_free(place.path, overwriting)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_opened(place, overwriting)) for place in places.disks]


def write_config(path: str, content: bytes, *, sync: bool) -> None:
    """Put a file in place, whole or not at all; what may be overwritten was checked before."""
    from casbackup.block.pending import PendingFile

    pending = PendingFile(path, replace=True)
    try:
        with open(pending.temporary, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        pending.publish(sync=sync)
    except OSError as error:
        raise TargetUnwritable(f"{path}: {error.strerror}") from error
    finally:
        pending.discard()


def _opened(place: DiskPlace, overwriting: Overwriting) -> Target:
    from casbackup.block.target import open_raw_target

    is_device = _is_block_device(place.path)
    if place.image_format != "raw":
        return _opened_image(place, overwriting, is_device=is_device)
    if is_device and not (overwriting.force or overwriting.in_place):
        _check_blank(place.path)
    return open_raw_target(place.path, place.disk.size_bytes, force=overwriting.force, in_place=overwriting.in_place)


def _opened_image(place: DiskPlace, overwriting: Overwriting, *, is_device: bool) -> Target:
    from casbackup.block.qemu_target import create_image_target

    if is_device:
        raise TargetUnsuitable(f"{place.path} is a block device: it can only hold a raw disk")
    if overwriting.in_place:
        raise UsageError(f"--in-place works on raw targets only, and {place.path} would be {place.image_format}")
    return create_image_target(
        place.path, place.disk.size_bytes, image_format=place.image_format, force=overwriting.force
    )


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _check_blank(path: str) -> None:
    """:raise TargetExists: when the beginning or the end of a device holds something."""
    try:
        with open(path, "rb", buffering=0) as device:
            size = device.seek(0, os.SEEK_END)
            for offset in (0, max(0, size - _LOOK_BYTES)):
                if any(os.pread(device.fileno(), _LOOK_BYTES, offset)):
                    raise TargetExists(f"{path} holds data")
    except OSError as error:
        raise TargetUnwritable(f"{path}: {error.strerror}") from error


def _check_free(path: str, overwriting: Overwriting) -> None:
    from casbackup.block.pending import existing_file

    if existing_file(path) is not None and not (overwriting.force or overwriting.in_place):
        raise TargetExists(f"{path} exists")


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
        raise TargetUnsuitable(f"{path} is a file, not a folder") from error
    except NotADirectoryError as error:
        raise TargetUnsuitable(f"{path}: a part of it is a file, not a folder") from error
    except OSError as error:
        raise TargetUnwritable(f"{path} cannot be created: {error.strerror}") from error
