"""What of a snapshot's manifest and notes is sealed in an encrypted repository (``docs/spec/encryption.md``).

The server must know a manifest's roots, sizes, time and labels to keep, expire and copy the snapshot. All of the
manifest is sealed inside it, so whoever has the key reads the rest there, and sees whether the public part was changed.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace

from casbackup.codec.crypto import seal, unseal
from casbackup.codec.master_key import MasterKey
from casbackup.errors import ManifestForged
from casbackup.ids import SnapshotId
from casbackup.spec.manifest import Manifest, decode_body, encode_body

_MANIFEST = b"casbackup manifest 1"
_NOTES = b"casbackup notes 1 "
_SEALED_NOTES = "sealed:"
_FOREIGN_NOTES = "(these notes were written by somebody without the key)"


class ManifestSeal:
    """Immutable, so any number of threads may share it."""

    def __init__(self, key: MasterKey) -> None:
        self._manifests = key.derived("casbackup 2026-11-24 manifest seal")
        self._notes = key.derived("casbackup 2026-11-24 notes seal")

    def seal(self, manifest: Manifest) -> Manifest:
        """The public part of a manifest, with all of it sealed inside."""
        return replace(public_part(manifest), sealed=seal(self._manifests, encode_body(manifest), _MANIFEST))

    def open(self, stored: Manifest, origin: str) -> Manifest:
        """The manifest that was sealed; ``origin`` names it in errors.

        :raise ManifestForged: when it was not sealed with this key, or does not say what its public part says.
        """
        body = unseal(self._manifests, stored.sealed, _MANIFEST)
        if body is None:
            raise ManifestForged(f"{origin} was not sealed with the repository's key, or was changed")
        manifest = decode_body(body, origin)
        if public_part(manifest) != replace(stored, sealed=b""):
            raise ManifestForged(f"what {origin} shows to everybody is not what was sealed in it")
        return manifest

    def seal_notes(self, snapshot: SnapshotId, notes: str) -> str:
        """Notes of a snapshot as they may stand in its sidecar. None of them stay none."""
        if not notes:
            return ""
        sealed = seal(self._notes, notes.encode(), _NOTES + snapshot.encode())
        return _SEALED_NOTES + base64.b64encode(sealed).decode()

    def open_notes(self, snapshot: SnapshotId, stored: str) -> str:
        """The notes; a sentence in their place if they were not sealed for this snapshot with this key."""
        if not stored:
            return ""
        try:
            sealed = base64.b64decode(stored.removeprefix(_SEALED_NOTES), validate=True)
        except (binascii.Error, ValueError):
            return _FOREIGN_NOTES
        notes = unseal(self._notes, sealed, _NOTES + snapshot.encode())
        return _FOREIGN_NOTES if notes is None else notes.decode()


def public_part(manifest: Manifest) -> Manifest:
    """What everybody who holds the repository may see of a manifest."""
    return replace(
        manifest,
        disks=tuple(replace(disk, source="") for disk in manifest.disks),
        configs=tuple(replace(c, name=f"config-{number}") for number, c in enumerate(manifest.configs, 1)),
        notes="",
        host="",
        archive=None,
        live=None,
        copy_of=None,
        sealed=b"",
    )
