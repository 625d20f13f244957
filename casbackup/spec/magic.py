"""All magics in one place. Each is the start of the BLAKE3 hash of a sentence (a test recomputes them)."""

from __future__ import annotations

SENTENCES = {
    "PACK_HEADER": "casbackup pack file, version 1",
    "PACK_TRAILER": "casbackup pack trailer, version 1",
    "RECORD": "casbackup record in a pack, version 1",
    "MANIFEST": "casbackup snapshot manifest, version 1",
    "LOST": "casbackup lost record on the wire, version 1",
}

PACK_HEADER = bytes.fromhex("97f10a1589218c75")
PACK_TRAILER = bytes.fromhex("40938f0f21068ebe")
RECORD = bytes.fromhex("de4767e3")
MANIFEST = bytes.fromhex("81c5301e0cf44d33")
LOST = bytes.fromhex("17839f18")
