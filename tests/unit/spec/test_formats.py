"""Every decoder: round trips, and what damage and nonsense come to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from struct import error as StructError
from typing import Any

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ConfigDamaged, ManifestDamaged, MigrationNeeded, NodeInvalid, UnsupportedFormat
from casbackup.ids import ZERO_ID, BlobId, DiskName, Namespace, PackId, SessionId, SnapshotId, VmName
from casbackup.limits import FANOUT, MAX_BLOB_BYTES, MAX_MANIFEST_BYTES, SEGMENT_BYTES
from casbackup.spec import config, indexdb, magic, manifest, node, outline, pack, record
from casbackup.tree.builder import leaf_bytes
from casbackup.tree.extents import normalised

PACK = PackId("00112233445566778899aabbccddeeff")
SESSION = SessionId("0123456789abcdef0123456789abcdef")
CHUNK = BlobId(bytes(range(32)))
MANIFEST = manifest.Manifest(
    namespace=Namespace("acme/prod"),
    vm=VmName("vm/100"),
    time_ms=1795377600123,
    sequence=7,
    disks=(manifest.DiskRecord(DiskName("scsi0"), 4096, CHUNK, "/dev/x"),),
    configs=(manifest.ConfigRecord("vm.conf", 3, BlobId(b"c" * 32)),),
    parent=SnapshotId("ab" * 32),
    labels=("daily",),
    notes="note",
    host="host",
    program="casbackup",
    stats=manifest.BackupStats(1, 2, 3, 4, 5, 6, 7),
)
CONFIG = config.RepositoryConfig("f550d5f295c6f82a21664a20021babe1", "2026-11-22T23:26:08.742Z")
CONFIG_ERRORS = (ConfigDamaged, UnsupportedFormat, MigrationNeeded)

u8, u32, u64 = st.integers(0, 2**8 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ids = st.binary(min_size=32, max_size=32).map(BlobId)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
msgpack_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def flips(data: bytes) -> Iterator[bytes]:
    """``data`` with each of its bits flipped in turn."""
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def garbled(valid: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, random bytes behind a true beginning, and valid ones with pieces missing."""
    lengths = st.integers(0, len(valid))
    return (
        st.binary(max_size=300)
        | st.builds(lambda n, tail: valid[:n] + tail, lengths, st.binary(max_size=200))
        | st.builds(lambda n, m: valid[:n] + valid[m:], lengths, lengths)
    )


def sealed_manifest(body: Any) -> bytes:
    """A manifest file around any body, its checksum right."""
    packed = msgpack.packb(body)
    head = manifest._HEADER.pack(magic.MANIFEST, manifest.VERSION, 0, len(packed)) + packed
    return head + blake3(head).digest()


def manifest_body() -> dict[str, Any]:
    body: dict[str, Any] = msgpack.unpackb(manifest.encode_manifest(MANIFEST)[0][16:-32])
    return body


# --- magics


@pytest.mark.parametrize("name", magic.SENTENCES)
def test_magics_come_from_their_sentences(name: str) -> None:
    value = getattr(magic, name)
    assert blake3(magic.SENTENCES[name].encode()).digest(length=len(value)) == value


def test_magics_differ_and_all_are_listed() -> None:
    values = {name: value for name, value in vars(magic).items() if isinstance(value, bytes)}
    assert set(values) == set(magic.SENTENCES)
    assert len({value[:4] for value in values.values()}) == len(values)


# --- records and packs


@given(st.sampled_from(list(record.BlobKind)), st.sampled_from([0, record.FLAG_ZSTD]), u32, u32, ids, st.binary())
def test_record_header_round_trip(kind: int, flags: int, stored: int, plain: int, blob: BlobId, rest: bytes) -> None:
    checksum = blake3(rest).digest(length=16)
    data = record.pack_checked(kind, flags, stored, plain, blob) + checksum
    assert len(data) == record.HEADER_BYTES
    assert record.parse_header(data + rest) == (kind, flags, stored, plain, blob, checksum)


@given(st.binary(min_size=64, max_size=80), st.booleans())
def test_random_record_headers(data: bytes, start_right: bool) -> None:
    found = record.parse_header(magic.RECORD + data[4:] if start_right else data)
    if found is not None:
        assert record.pack_checked(*found[:5]) + found.checksum == magic.RECORD + data[4:64]


def test_flipped_record_headers_are_none_or_say_what_they_hold() -> None:
    valid = record.pack_checked(1, 1, 1000, 4096, CHUNK) + bytes(16)
    for data in flips(valid):
        found = record.parse_header(data)
        assert found is None or record.pack_checked(*found[:5]) + found.checksum == data


def test_pack_header_round_trip_and_flips() -> None:
    valid = pack.pack_header(PACK, SESSION) + bytes(16)
    assert len(valid) == pack.HEADER_BYTES
    assert pack.parse_header(valid) == (PACK, SESSION)
    for number, data in enumerate(flips(valid)):
        found = pack.parse_header(data)
        assert (found is None) == (number < 10 * 8)
        if found is not None:
            assert found != (PACK, SESSION) or number // 8 in (*range(10, 16), *range(48, 64))
    assert pack.parse_header(valid[:-1]) is None


@given(u32, u64)
def test_pack_trailer_round_trip(records: int, offset: int) -> None:
    trailer = pack.PackTrailer(records, offset, PACK)
    assert pack.parse_trailer(pack.pack_trailer(trailer) + bytes(16)) == trailer


@given(garbled(pack.pack_trailer(pack.PackTrailer(3, 5000, PACK)) + bytes(16)))
def test_garbled_pack_headers_and_trailers(data: bytes) -> None:
    trailer = pack.parse_trailer(data)
    assert trailer is None or data.startswith(magic.PACK_TRAILER)
    header = pack.parse_header(magic.PACK_HEADER + data[8:])
    assert header is None or pack.pack_header(*header)[:10] == magic.PACK_HEADER + data[8:10]


@settings(max_examples=35)
@given(st.lists(st.builds(pack.PackEntry, u32, u32, u32, u8, u8, ids)))
def test_pack_entries_round_trip(entries: list[pack.PackEntry]) -> None:
    data = pack.pack_entries(entries)
    assert len(data) == pack.ENTRY_BYTES * len(entries)
    assert list(pack.parse_entries(data)) == entries


def test_flipped_pack_entries_differ_in_one_field_at_the_most() -> None:
    entry = pack.PackEntry(64, 17, 18, 1, 0, CHUNK)
    for data in flips(pack.pack_entries([entry])):
        (found,) = pack.parse_entries(data)
        assert sum(a != b for a, b in zip(found, entry, strict=True)) <= 1


# --- tree nodes

lengths = st.integers(1, SEGMENT_BYTES // 8)
chunks = st.sampled_from([CHUNK, BlobId(b"b" * 32)])
extents = st.builds(node.Extent, lengths, st.integers(0, SEGMENT_BYTES), chunks) | lengths.map(node.zero_extent)


@settings(max_examples=35)
@given(st.lists(extents, min_size=1, max_size=8))
def test_leaf_round_trip(found: list[node.Extent]) -> None:
    normal = normalised(found)
    data = leaf_bytes(found)
    if data is None:
        assert all(extent.is_zero for extent in found)
        return
    assert node.decode_node(data) == node.Leaf(sum(e.length for e in found), normal)
    assert normalised(normal) == normal


@settings(max_examples=35)
@given(st.integers(1, 4), st.lists(ids | st.just(ZERO_ID), max_size=FANOUT - 1), ids.filter(lambda i: i != ZERO_ID))
def test_inner_round_trip(level: int, children: list[BlobId], last: BlobId) -> None:
    assert node.decode_node(node.encode_inner(level, [*children, last])) == node.Inner(level, [*children, last])


NODES = {
    "leaf": node.encode_leaf([node.Extent(4096, 8192, CHUNK), node.zero_extent(512), node.Extent(100, 0, CHUNK)]),
    "inner": node.encode_inner(2, [CHUNK, ZERO_ID, CHUNK]),
}


def checked_node(data: bytes) -> bool:
    """Decode: nonsense is refused as such, and what is accepted has one form only."""
    try:
        found = node.decode_node(data)
    except NodeInvalid:
        return False
    if isinstance(found, node.Leaf):
        assert node.encode_leaf(found.extents) == data
    else:
        assert node.encode_inner(found.level, found.children) == data
    return True


@pytest.mark.parametrize("kind", NODES)
def test_flipped_nodes(kind: str) -> None:
    assert checked_node(NODES[kind])
    accepted = [checked_node(data) for data in flips(NODES[kind])]
    assert not any(accepted[:32]), "type, version and count are checked"
    assert not all(accepted)


@given(garbled(NODES["leaf"]) | garbled(NODES["inner"]))
def test_garbled_nodes(data: bytes) -> None:
    checked_node(data)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        [node.zero_extent(4096)],
        [node.Extent(0, 0, CHUNK)],
        [node.Extent(5, 0, CHUNK), node.zero_extent(5), node.zero_extent(5)],
        [node.Extent(5, 0, CHUNK), node.Extent(5, 1, ZERO_ID)],
        [node.Extent(1, MAX_BLOB_BYTES, CHUNK)],
        [node.Extent(SEGMENT_BYTES, 0, CHUNK), node.Extent(1, 0, CHUNK)],
        [node.Extent(1, n % 2 * 10, CHUNK) for n in range(node.MAX_EXTENTS + 1)],
    ],
    ids=["empty", "zero", "no length", "zeros apart", "skip in zeros", "past a blob", "past a segment", "too many"],
)
def test_impossible_leaves(broken: list[node.Extent]) -> None:
    with pytest.raises(NodeInvalid):
        node.decode_node(node.encode_leaf(broken))


@pytest.mark.parametrize(
    ("level", "children"),
    [(0, [CHUNK]), (5, [CHUNK]), (1, []), (1, [CHUNK, ZERO_ID]), (1, [ZERO_ID]), (1, [CHUNK] * (FANOUT + 1))],
)
def test_impossible_inner_nodes(level: int, children: list[BlobId]) -> None:
    with pytest.raises(NodeInvalid):
        node.decode_node(node.encode_inner(level, children))


def test_outlines_round_trip() -> None:
    other = BlobId(b"o" * 32)
    inner = outline.encode_inner_outline(77, outline.distinct_children(node.Inner(1, [CHUNK, ZERO_ID, CHUNK, other])))
    assert outline.decode_head(inner) == (node.INNER, 77)
    assert outline.decode_children(inner) == [CHUNK, other]
    leaf = outline.encode_leaf_outline(2**32 - 1, [(CHUNK, 100, 4096)])
    assert outline.decode_head(leaf) == (node.LEAF, 2**32 - 1)
    assert len(leaf) == outline.HEADER_BYTES + outline.CHUNK_BYTES


# --- manifests and sidecars

names = st.text("aZ0_", min_size=1, max_size=4)


@settings(max_examples=40)
@given(
    names,
    st.lists(st.tuples(names, st.integers(0, 2**50), ids), max_size=4),
    st.lists(st.text(max_size=5), max_size=3),
    st.text(),
    st.integers(0, 2**63 - 1),
)
def test_manifest_round_trip(
    vm: str, disks: list[tuple[str, int, BlobId]], labels: list[str], notes: str, time_ms: int
) -> None:
    changed = replace(
        MANIFEST,
        vm=VmName(f"vm/{vm}"),
        disks=tuple(manifest.DiskRecord(DiskName(name), size, root, notes) for name, size, root in disks),
        labels=tuple(labels),
        notes=notes,
        time_ms=time_ms,
        parent=None if len(disks) % 2 else MANIFEST.parent,
    )
    data, snapshot = manifest.encode_manifest(changed)
    assert manifest.decode_manifest(data, "m") == (changed, snapshot)
    assert snapshot == blake3(data).hexdigest()
    assert changed.size_bytes == sum(size for _, size, _ in disks) + 3


def test_what_an_archive_said_is_kept() -> None:
    origin = manifest.ArchiveOrigin(
        "vma",
        bytes(range(16)),
        -1,
        (manifest.ArchivedDisk("drive-\udcff/x", 7), manifest.ArchivedDisk("", None)),
        ("../a",),
        (manifest.MissingRange(0, 65536, 2**40),),
    )
    state = manifest.DiskRecord(DiskName("vmstate"), 10, CHUNK, role=manifest.VMSTATE)
    imported = replace(MANIFEST, archive=origin, disks=(*MANIFEST.disks, state))
    data, snapshot = manifest.encode_manifest(imported)
    assert manifest.decode_manifest(data, "m") == (imported, snapshot)


@pytest.mark.parametrize(
    "change",
    [{"disks": [["a"]]}, {"uuid": "x"}, {"missing": [[1, 2]]}, {"configs": [1]}, {"configs": []}, {"disks": []}],
)
def test_a_wrong_archive_part_is_damage(change: dict[str, Any]) -> None:
    origin = manifest.ArchiveOrigin("vma", disks=(manifest.ArchivedDisk("a"),), configs=("b",))
    body = msgpack.unpackb(manifest.encode_manifest(replace(MANIFEST, archive=origin))[0][16:-32])
    with pytest.raises(ManifestDamaged):
        manifest.decode_manifest(sealed_manifest({**body, "archive": {**body["archive"], **change}}), "m")


def test_every_flipped_bit_of_a_manifest_is_noticed() -> None:
    data, _ = manifest.encode_manifest(MANIFEST)
    for changed in flips(data):
        with pytest.raises(ManifestDamaged):
            manifest.decode_manifest(changed, "m")


@given(garbled(manifest.encode_manifest(MANIFEST)[0]))
def test_garbled_manifests(data: bytes) -> None:
    if data != manifest.encode_manifest(MANIFEST)[0]:
        with pytest.raises(ManifestDamaged, match="manifest m "):
            manifest.decode_manifest(data, "m")


def test_an_oversized_manifest() -> None:
    with pytest.raises(ManifestDamaged):
        manifest.decode_manifest(bytes(MAX_MANIFEST_BYTES + 1), "m")


@settings(max_examples=35)
@given(st.sampled_from(sorted(manifest_body())), msgpack_values)
def test_manifests_with_a_nonsense_field_and_a_right_checksum(key: str, value: Any) -> None:
    body = {**manifest_body(), key: value}
    try:
        found, _ = manifest.decode_manifest(sealed_manifest(body), "m")
    except ManifestDamaged:
        return
    assert isinstance(found, manifest.Manifest)


@pytest.mark.parametrize("body", [None, [], 5, "text", {}, {1: 2}, manifest_body() | {"disks": [[]]}])
def test_manifests_whose_body_is_none(body: Any) -> None:
    with pytest.raises(ManifestDamaged):
        manifest.decode_manifest(sealed_manifest(body), "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("namespace", "vm"),
        ("namespace", "../etc"),
        ("vm", "100"),
        ("disks", [["../../etc/passwd", 1, CHUNK, ""]]),
        ("disks", [["scsi0", -1, CHUNK, ""]]),
        ("disks", [["scsi0", 2**60, CHUNK, ""]]),
        ("disks", [["scsi0", 1, CHUNK[:31], ""]]),
        ("stats", []),
        ("labels", [1]),
        ("time_ms", "now"),
    ],
)
def test_manifests_that_break_a_rule(key: str, value: Any) -> None:
    with pytest.raises(ManifestDamaged):
        manifest.decode_manifest(sealed_manifest({**manifest_body(), key: value}), "m")


@given(st.booleans(), st.none() | st.lists(st.text()).map(tuple), st.none() | st.text())
def test_sidecar_round_trip(pinned: bool, labels: tuple[str, ...] | None, notes: str | None) -> None:
    sidecar = manifest.Sidecar(pinned, labels, notes)
    assert manifest.decode_sidecar(manifest.encode_sidecar(sidecar), "s") == sidecar


SIDECAR = manifest.encode_sidecar(manifest.Sidecar(True, ("a", "b"), "n\u00f6te"))


def sidecar_is_sound_or_damaged(data: bytes) -> None:
    try:
        found = manifest.decode_sidecar(data, "s")
    except ManifestDamaged:
        return
    assert manifest.decode_sidecar(manifest.encode_sidecar(found), "s") == found


def test_flipped_sidecars() -> None:
    for data in flips(SIDECAR):
        sidecar_is_sound_or_damaged(data)


@given(garbled(SIDECAR) | json_values.map(lambda value: json.dumps(value).encode()))
def test_garbled_sidecars(data: bytes) -> None:
    sidecar_is_sound_or_damaged(data)


@settings(max_examples=35)
@given(st.fixed_dictionaries({"pinned": json_values, "labels": json_values, "notes": json_values}))
def test_sidecars_with_nonsense_values(content: dict[str, Any]) -> None:
    sidecar_is_sound_or_damaged(json.dumps(content).encode())


# --- config.json


@given(st.integers(-7, 19), st.integers(2**20, 2**30), st.integers(1, 64), st.integers(64, 1024))
def test_config_round_trip(level: int, pack_bytes: int, low: int, high: int) -> None:
    changed = replace(
        CONFIG,
        compression_level=level,
        pack_bytes=pack_bytes,
        chunker=config.ChunkerConfig(min_blocks=low, max_blocks=high),
    )
    assert config.decode_config(config.encode_config(changed), "c") == changed


def test_flipped_configs() -> None:
    for data in flips(config.encode_config(CONFIG)):
        try:
            found = config.decode_config(data, "c")
        except CONFIG_ERRORS:
            continue
        assert config.decode_config(config.encode_config(found), "c") == found


@given(garbled(config.encode_config(CONFIG)) | json_values.map(lambda value: json.dumps(value).encode()))
def test_garbled_configs(data: bytes) -> None:
    """What is accepted is a configuration; that it is another one shows by the copy beside it."""
    try:
        found = config.decode_config(data, "c")
    except CONFIG_ERRORS:
        return
    assert config.decode_config(config.encode_config(found), "c") == found


def config_with(path: str, value: Any) -> bytes:
    content = json.loads(config.encode_config(CONFIG))
    target = content
    *folders, key = path.split(".")
    for folder in folders:
        target = target[folder]
    target[key] = value
    return json.dumps(content).encode()


@settings(max_examples=35)
@given(
    st.sampled_from(["casbackup", "repository_id", "format", "chunker", "compression_level", "pack_bytes",
                     "chunker.name", "chunker.min_blocks", "chunker.cuts_in_256", "unknown"]),
    json_values,
)  # fmt: skip
def test_configs_with_nonsense_values(path: str, value: Any) -> None:
    with suppress(*CONFIG_ERRORS):
        config.decode_config(config_with(path, value), "c")


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("format", 2, UnsupportedFormat),
        ("format", 0, MigrationNeeded),
        ("format", -1, ConfigDamaged),
        ("format", "1", ConfigDamaged),
        ("casbackup", "something", ConfigDamaged),
        ("chunker.name", "other", ConfigDamaged),
        ("chunker.min_blocks", 65, ConfigDamaged),
        ("chunker.cuts_in_256", 256, ConfigDamaged),
        ("pack_bytes", 2**31, ConfigDamaged),
        ("compression_level", 20, ConfigDamaged),
        ("unknown", 1, ConfigDamaged),
    ],
)
def test_configs_that_are_refused(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        config.decode_config(config_with(path, value), "c")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("repository_id", 5),
        ("created", None),
        ("format", True),
        ("pack_bytes", 2.5e6),
        ("compression_level", 2.5),
        ("chunker.min_blocks", 4.5),
    ],
)
def test_configs_with_values_of_another_type_are_refused(path: str, value: Any) -> None:
    with pytest.raises(ConfigDamaged):
        config.decode_config(config_with(path, value), "c")


# --- index values


@given(st.binary(min_size=32, max_size=32))
def test_any_32_bytes_are_a_blob_entry(data: bytes) -> None:
    entry = indexdb.decode_entry(data)
    assert entry.encode() == data
    assert entry.is_present == (data[indexdb.STATE_OFFSET] == 0 and data[24:28] == bytes(4))
    assert int.from_bytes(data[indexdb.EPOCH_OFFSET :][:4], "little") == entry.dying_epoch


@given(st.binary(max_size=64).filter(lambda data: len(data) != 32))
def test_other_lengths_are_no_blob_entry(data: bytes) -> None:
    with pytest.raises(StructError):
        indexdb.decode_entry(data)


@given(u32, st.booleans(), u64)
def test_pack_row_round_trip(session: int, sealed: bool, size: int) -> None:
    row = indexdb.PackRow(PACK, session, sealed, size)
    assert indexdb.decode_pack_row(row.encode()) == row


@given(u32, u32)
def test_pack_keys_sort_like_their_numbers(a: int, b: int) -> None:
    assert (indexdb.pack_key(a) < indexdb.pack_key(b)) == (a < b)
