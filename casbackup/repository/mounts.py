"""Which file system a path is on. LMDB's locks and memory map are not safe on network file systems."""

from __future__ import annotations

import os

_NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "fuse.cephfs",
        "fuse.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
    }
)
_MOUNTS = "/proc/self/mountinfo"


def is_network_file_system(path: str, mounts_file: str = _MOUNTS) -> str | None:
    """The type of the file system if it is a network one, else None (also where the system cannot tell)."""
    kind = file_system_type(path, mounts_file)
    return kind if kind in _NETWORK else None


def file_system_type(path: str, mounts_file: str = _MOUNTS) -> str | None:
    """The type of the mount that holds ``path``: the one with the longest mount point, the last of equals."""
    real = os.path.realpath(path)
    best, found = -1, None
    try:
        with open(mounts_file, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, found = len(point), after.split()[0]
    return found
