"""What shells offer at TAB beyond options: VMs, snapshots, profiles, keys. A failure offers nothing, silently."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from casbackup.errors import CasbackupError
from casbackup_client.app import App, KeyUse

_ID_DIGITS = 8


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    with contextlib.suppress(CasbackupError, OSError):
        yield


def profiles(incomplete: str) -> list[str]:
    found: set[str] = set()
    with _silently():
        from casbackup_client.config_file import read_files

        found = {name for file in read_files(os.environ) for name in file.profiles}
    return sorted(name for name in found if name.startswith(incomplete))


def vms(app: App, incomplete: str) -> list[str]:
    found: set[str] = set()
    with _silently(), app.peer(KeyUse.NONE) as peer:
        found = {snapshot.manifest.vm for snapshot in peer.survey(app.namespace)[0]}
    return sorted(name for name in found if name.startswith(incomplete))


def references(app: App, incomplete: str) -> list[str]:
    """VMs, and ids once some digits are there. Times are not offered: shells break words at their colons."""
    found: set[str] = set()
    with _silently(), app.peer(KeyUse.NONE) as peer:
        for snapshot in peer.survey(app.namespace)[0]:
            found |= {
                snapshot.manifest.vm,
                snapshot.id[: max(_ID_DIGITS, len(incomplete))] if incomplete else "",
            }
    return sorted(name for name in found - {""} if name.startswith(incomplete))


def fingerprints(app: App, incomplete: str) -> list[str]:
    found: list[str] = []
    with _silently():
        found = app.keys.ring.fingerprints()
    return [fingerprint for fingerprint in found if fingerprint.startswith(incomplete)]
