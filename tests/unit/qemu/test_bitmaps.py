"""Which bitmap an increment may be based on."""

from __future__ import annotations

from dataclasses import replace

from casbackup.ids import DEFAULT_NAMESPACE, DiskName, VmName
from casbackup.qemu import bitmaps
from casbackup.qemu.disks import LiveBitmap, LiveDisk

TARGET = bitmaps.target_of("0" * 32, DEFAULT_NAMESPACE, VmName("vm/100"))
OTHER = bitmaps.target_of("1" * 32, DEFAULT_NAMESPACE, VmName("vm/100"))
OLD, NEW = "a" * 16, "b" * 16
DISK = LiveDisk(DiskName("scsi0"), "node", 1 << 20, "/vm.raw")
SIZES = {DISK.name: DISK.size_bytes}


def bitmap(token: str, target: str = TARGET) -> LiveBitmap:
    return LiveBitmap(bitmaps.bitmap_name(target, token), 0, usable=True, inconsistent=False)


def with_bitmaps(*found: LiveBitmap) -> LiveDisk:
    return replace(DISK, bitmaps=found)


def test_the_newest_snapshot_with_a_bitmap_is_the_base() -> None:
    disk = with_bitmaps(bitmap(OLD), bitmap(NEW))
    assert bitmaps.choose(disk, TARGET, {NEW: SIZES, OLD: SIZES}).token == NEW
    assert bitmaps.choose(disk, TARGET, {OLD: SIZES}).token == OLD


def test_names_go_both_ways_and_targets_keep_apart() -> None:
    assert bitmaps.token_of(bitmaps.bitmap_name(TARGET, NEW), TARGET) == NEW
    for name in (bitmaps.bitmap_name(OTHER, NEW), "casbackup0", f"casbackup-{TARGET}-xyz", ""):
        assert bitmaps.token_of(name, TARGET) is None
    assert len({TARGET, OTHER, bitmaps.target_of("0" * 32, DEFAULT_NAMESPACE, VmName("vm/101"))}) == 3


def test_why_a_disk_is_read_as_a_whole() -> None:
    cases = [
        (with_bitmaps(), {}, "no snapshot has", False),
        (with_bitmaps(), {NEW: SIZES}, "is lost", True),
        (with_bitmaps(bitmap(NEW, OTHER)), {NEW: SIZES}, "is lost", True),
        (with_bitmaps(bitmap(OLD)), {NEW: SIZES}, "belongs to no snapshot", True),
        (with_bitmaps(replace(bitmap(NEW), usable=False, inconsistent=True)), {NEW: SIZES}, "inconsistent", True),
        (with_bitmaps(replace(bitmap(NEW), usable=False)), {NEW: SIZES}, "in use", True),
        (with_bitmaps(bitmap(NEW)), {NEW: {}}, "lacks the disk", True),
        (with_bitmaps(bitmap(NEW)), {NEW: {DISK.name: 512}}, "the disk had 512 bytes", True),
    ]
    for disk, known, reason, lost in cases:
        based_on = bitmaps.choose(disk, TARGET, known)
        assert based_on.token is None
        assert reason in based_on.reason
        assert based_on.lost is lost


def test_bitmaps_of_other_targets_are_never_stale() -> None:
    disk = with_bitmaps(bitmap(OLD), bitmap(NEW), bitmap(OLD, OTHER))
    assert bitmaps.stale(disk, TARGET, [NEW]) == [bitmaps.bitmap_name(TARGET, OLD)]
