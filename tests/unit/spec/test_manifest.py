"""Manifests that come from elsewhere."""

from __future__ import annotations

import pytest

from casbackup.errors import ManifestDamaged
from casbackup.ids import DEFAULT_NAMESPACE, ZERO_ID, VmName
from casbackup.spec.manifest import ConfigRecord, Manifest, decode_manifest, encode_manifest


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "", "a\0b"])
def test_a_config_whose_name_leads_elsewhere_is_damage(name: str) -> None:
    manifest = Manifest(DEFAULT_NAMESPACE, VmName("vm/1"), 0, 1, (), configs=(ConfigRecord(name, 0, ZERO_ID),))
    with pytest.raises(ManifestDamaged, match="config"):
        decode_manifest(encode_manifest(manifest)[0], "here")
