"""A new image file of one of QEMU's formats as the target of a restore."""

from __future__ import annotations

from casbackup.block import qemu_img
from casbackup.block.align import byte_addressable
from casbackup.block.guard import Guarded
from casbackup.block.pending import PendingFile
from casbackup.block.qemu_nbd import QemuImage
from casbackup.block.target import Target


def create_image_target(path: str, size_bytes: int, *, image_format: str = "qcow2", force: bool = False) -> Target:
    """A new image at ``path``, which appears there on ``commit``. See ``target`` for the order of that.

    The device's size is ``size_bytes`` rounded up to a multiple of 512: QEMU knows no others.

    :raise TargetExists: when ``path`` exists and ``force`` is not given.
    :raise TargetUnsuitable: when it is no regular file, or its folder does not exist.
    :raise TargetUnwritable: when nothing can be created there.
    :raise ToolMissing: when qemu-img or qemu-nbd is not installed.
    :raise ToolFailed: when one of them fails.
    """
    pending = PendingFile(path, replace=force)
    try:
        qemu_img.create(pending.temporary, image_format, size_bytes)
        device = QemuImage.open(pending.temporary, image_format, writable=True)
    except BaseException:
        pending.discard()
        raise
    return Target(Guarded(byte_addressable(device)), pending=pending, starts_zero=True)
