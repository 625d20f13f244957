"""Reading packs without an index, whole and damaged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.codec.codec import PLAIN
from casbackup.fs import RealFileSystem
from casbackup.ids import PackId, SessionId, new_pack_id, new_session_id
from casbackup.spec.magic import RECORD
from casbackup.spec.pack import ENTRY_BYTES, HEADER_BYTES, TRAILER_BYTES, PackEntry, PackHeader
from casbackup.spec.record import BlobKind, Record
from casbackup.store import packfile
from casbackup.store.packfile import (
    Damage,
    Found,
    encode_footer,
    encode_header,
    headers,
    read_footer,
    read_header,
    scan,
)
from casbackup.store.packstorage import FolderPackStorage
from casbackup.testing.packstorage import MemoryPackStorage

SESSION = new_session_id()


def a_pack(plains: Sequence[bytes], *, sealed: bool = True) -> tuple[PackId, bytes, list[PackEntry]]:
    pack = new_pack_id()
    data, entries = encode_header(pack, SESSION), []
    for plain in plains:
        record = PLAIN.encode_blob(BlobKind.CHUNK, plain, 2)
        entries.append(PackEntry(len(data), len(record.payload), len(plain), record.kind, record.flags, record.id))
        data += record.header + bytes(record.payload)
    return pack, data + (encode_footer(pack, entries, len(data)) if sealed else b""), entries


def stored(pack: PackId, data: bytes) -> MemoryPackStorage:
    storage = MemoryPackStorage()
    appender = storage.create(pack)
    appender.append([data])
    appender.sync()
    appender.close()
    return storage


def covers(found: Sequence[Found | Damage], start: int, end: int) -> bool:
    """Do the items lie one after the other, without a gap?"""
    for item in found:
        if item.offset != start:
            return False
        start += item.record.total_bytes if isinstance(item, Found) else item.length
    return start == end


PLAINS = [random.Random(n).randbytes(20 + n) for n in range(5)] + [b"compressible " * 30]


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=100)), st.booleans())
def test_a_sound_pack(plains: list[bytes], sealed: bool) -> None:
    pack, data, entries = a_pack(plains, sealed=sealed)
    storage = stored(pack, data)
    assert read_header(storage, pack) == PackHeader(pack, SESSION)
    assert read_footer(storage, pack) == (entries if sealed else None)
    found = list(scan(storage, pack))
    assert [(item.offset, item.record.id) for item in found if isinstance(item, Found)] == [
        (entry.offset, entry.id) for entry in entries
    ]
    assert len(found) == len(entries)
    listed = [(offset, h.id, h.stored_length, h.plain_length, h.flags) for offset, h in headers(storage, pack)]
    assert listed == [(e.offset, e.id, e.stored_length, e.plain_length, e.flags) for e in entries]


def test_a_damaged_record_costs_that_record_alone_and_its_bytes_are_reported() -> None:
    pack, data, entries = a_pack(PLAINS)
    for position in range(entries[2].offset, entries[3].offset):
        changed = bytearray(data)
        changed[position] ^= 0x10
        found = list(scan(stored(pack, bytes(changed)), pack))
        assert [i.record.id for i in found if isinstance(i, Found)] == [e.id for e in entries if e != entries[2]]
        (damage,) = [i for i in found if isinstance(i, Damage)]
        assert (damage.offset, damage.length) == (entries[2].offset, entries[3].offset - entries[2].offset)
        assert damage.reason


@settings(max_examples=60)
@given(st.integers(0, 6), st.integers(1, 300), st.binary(max_size=40))
def test_missing_and_additional_bytes_do_not_stop_a_scan(number: int, cut: int, junk: bytes) -> None:
    """Bytes vanish and others appear in an unsealed pack: all untouched records are found, all else is reported."""
    pack, data, entries = a_pack(PLAINS, sealed=False)
    edges = [*(entry.offset for entry in entries), len(data)]
    at = edges[min(number, len(entries) - 1)] + 10
    changed = data[:at] + junk + data[at + cut :]
    found = list(scan(stored(pack, changed), pack))
    assert covers(found, HEADER_BYTES, len(changed))
    untouched = {e.id for e, end in zip(entries, edges[1:], strict=True) if end <= at or e.offset >= at + cut}
    assert untouched <= {item.record.id for item in found if isinstance(item, Found)}


@settings(max_examples=60)
@given(st.data())
def test_one_flipped_bit_anywhere_costs_one_record_at_the_most(data: st.DataObject) -> None:
    """Of a sealed pack; never the records behind it."""
    pack, content, entries = a_pack(PLAINS)
    bit = data.draw(
        st.integers(0, len(content) * 8 - 1) | st.integers((len(content) - TRAILER_BYTES) * 8, len(content) * 8 - 1)
    )
    check_flipped(pack, content, entries, bit)


def check_flipped(pack: PackId, content: bytes, entries: list[PackEntry], bit: int) -> None:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    storage = stored(pack, bytes(changed))
    hit = {e.id for e in entries if e.offset <= bit // 8 < e.offset + 64 + e.stored_length}
    found = [item.record.id for item in scan(storage, pack) if isinstance(item, Found)]
    assert found == [e.id for e in entries if e.id not in hit]
    footer_at = len(content) - TRAILER_BYTES - ENTRY_BYTES * len(entries)
    assert (read_footer(storage, pack) is None) == (bit // 8 >= footer_at)
    assert (read_header(storage, pack) is None) == (bit // 8 < HEADER_BYTES)


def test_a_flipped_bit_in_the_footers_offset_hides_no_record() -> None:
    pack, content, entries = a_pack(PLAINS)
    for bit in range((len(content) - 48) * 8, (len(content) - 40) * 8):
        check_flipped(pack, content, entries, bit)


@pytest.mark.parametrize("sealed", [True, False])
def test_truncated_packs(sealed: bool) -> None:
    pack, data, entries = a_pack(PLAINS, sealed=sealed)
    for size in range(0, len(data), 7):
        storage = stored(pack, data[:size])
        assert read_footer(storage, pack) is None
        found = list(scan(storage, pack))
        whole = [e.id for e in entries if e.offset + 64 + e.stored_length <= size]
        assert [item.record.id for item in found if isinstance(item, Found)] == whole
        assert covers(found, 0 if size < HEADER_BYTES else HEADER_BYTES, size)
        assert [header.id for _, header in headers(storage, pack)] == whole


def test_garbage_with_magics_is_all_damage() -> None:
    pack = new_pack_id()
    data = encode_header(pack, SESSION) + (RECORD + b"\1\0\0\0" + b"\x10\0\0\0" * 2) * 200
    (damage,) = scan(stored(pack, data), pack)
    assert isinstance(damage, Damage)
    assert damage[:2] == (HEADER_BYTES, len(data) - HEADER_BYTES)


def test_a_record_within_a_record_is_met_only_when_the_outer_one_is_damaged() -> None:
    inner = PLAIN.encode_blob(BlobKind.CHUNK, random.Random(0).randbytes(50), 2)
    pack, data, entries = a_pack([inner.header + bytes(inner.payload)])
    assert [i.record.id for i in scan(stored(pack, data), pack) if isinstance(i, Found)] == [entries[0].id]
    changed = bytearray(data)
    changed[HEADER_BYTES + 10] ^= 1
    assert [i.record.id for i in scan(stored(pack, bytes(changed)), pack) if isinstance(i, Found)] == [inner.id]


def test_a_record_across_the_end_of_a_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packfile, "_WINDOW_BYTES", 100)
    pack, data, entries = a_pack(PLAINS, sealed=False)
    for junk in range(1, 210):
        changed = data[: entries[0].offset] + b"j" * junk + data[entries[0].offset :]
        found = [i.record.id for i in scan(stored(pack, changed), pack) if isinstance(i, Found)]
        assert found == [entry.id for entry in entries]


def test_another_packs_footer_is_not_believed() -> None:
    pack, data, entries = a_pack(PLAINS, sealed=False)
    storage = stored(pack, data + encode_footer(new_pack_id(), entries, len(data)))
    assert read_footer(storage, pack) is None
    assert [h.id for _, h in headers(storage, pack)] == [e.id for e in entries]


def test_the_header_of_another_session_is_told(tmp_path: Path) -> None:
    storage = FolderPackStorage(RealFileSystem(), str(tmp_path))
    appender = storage.create(new_pack_id())
    appender.append([encode_header(appender.pack, SessionId("ab" * 16))])
    appender.sync()
    appender.close()
    header = read_header(storage, appender.pack)
    assert header is not None and header.session == "ab" * 16


def test_records_of_every_kind_are_found() -> None:
    made: list[Record] = [PLAIN.encode_blob(kind, b"x", 2) for kind in BlobKind]
    pack = new_pack_id()
    data = encode_header(pack, SESSION) + b"".join(r.header + bytes(r.payload) for r in made)
    assert [i.record.kind for i in scan(stored(pack, data), pack) if isinstance(i, Found)] == [1, 2, 3]
