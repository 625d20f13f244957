"""What goes over the wire: it comes back whole from pieces of any size, and rubbish is told."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.codec import PLAIN
from casbackup.errors import BlobMissing, ManifestDamaged, NodeInvalid, PackDamaged, ServerProtocolError
from casbackup.ids import ZERO_ID, BlobId
from casbackup.spec import wire
from casbackup.spec.record import BlobKind, Record

RECORDS = [PLAIN.encode_blob(BlobKind.CHUNK, bytes([n]) * n, 1) for n in range(1, 40)]
MISSING = BlobId(b"m" * 32)
STREAM = b"".join(r.header + bytes(r.payload) for r in RECORDS) + wire.encode_lost(MISSING, BlobMissing("gone: ä"))


@given(st.lists(st.binary(min_size=32, max_size=32).filter(lambda i: i != ZERO_ID)))
def test_ids(ids: list[BlobId]) -> None:
    assert wire.unpack_ids(wire.pack_ids(ids)) == ids


@pytest.mark.parametrize("data", [b"x", b"x" * 33, ZERO_ID, b"x" * 32 + ZERO_ID])
def test_ids_that_are_none(data: bytes) -> None:
    with pytest.raises(ServerProtocolError):
        wire.unpack_ids(data)


@given(st.lists(st.booleans()))
def test_flags(flags: list[bool]) -> None:
    packed = wire.pack_flags(flags)
    assert len(packed) == (len(flags) + 7) // 8
    assert wire.unpack_flags(packed, len(flags)) == flags


@pytest.mark.parametrize(("data", "count"), [(b"", 1), (b"\0\0", 8), (b"\2", 1), (b"\0", 0)])
def test_flags_that_are_none(data: bytes, count: int) -> None:
    with pytest.raises(ServerProtocolError):
        wire.unpack_flags(data, count)


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_records_in_pieces(cuts: list[int]) -> None:
    parser = wire.FrameParser()
    places = [0, *sorted(cuts), len(STREAM)]
    found = [item for a, b in pairwise(places) for item in parser.feed(STREAM[a:b])]
    parser.end()
    assert [blob_id for blob_id, _ in found] == [*(r.id for r in RECORDS), MISSING]
    for (_, record), sent in zip(found, RECORDS, strict=False):
        assert isinstance(record, Record)
        assert (record.header, bytes(record.payload)) == (sent.header, bytes(sent.payload))
    assert isinstance(found[-1][1], BlobMissing) and str(found[-1][1]) == "gone: ä"


def test_a_cut_stream_is_told() -> None:
    parser = wire.FrameParser()
    list(parser.feed(STREAM[:-1]))
    with pytest.raises(ServerProtocolError, match="cut off"):
        parser.end()


@given(st.binary(min_size=64, max_size=300))
def test_rubbish(data: bytes) -> None:
    parser = wire.FrameParser()
    with pytest.raises(ServerProtocolError):
        list(parser.feed(data))
        parser.end()
        raise AssertionError("rubbish was taken for records")


@pytest.mark.parametrize("damage", [NodeInvalid("x"), PackDamaged("y"), BlobMissing("z" * 10_000)])
def test_damage_keeps_its_class(damage: Exception) -> None:
    data = wire.encode_lost(MISSING, damage)  # type: ignore[arg-type]
    ((blob_id, found),) = wire.FrameParser().feed(data)
    assert blob_id == MISSING
    assert type(found) is type(damage)
    assert str(damage).startswith(str(found))


def test_snapshots() -> None:
    data = wire.encode_snapshot(b"m" * 100, b"{}") + wire.encode_damaged_snapshot(ManifestDamaged("bad"))
    whole, damaged = wire.decode_snapshots(data)
    assert whole == wire.SnapshotFrame(b"m" * 100, b"{}")
    assert isinstance(damaged, ManifestDamaged) and str(damaged) == "bad"
    for end in range(1, len(data)):
        if end != 110:
            with pytest.raises(ServerProtocolError):
                list(wire.decode_snapshots(data[:end]))


def test_a_refused_snapshot() -> None:
    data = wire.encode_snapshot(b"manifest", b"sidecar") + wire.encode_refused_snapshot(b"{}")
    assert list(wire.decode_snapshots(data)) == [wire.SnapshotFrame(b"manifest", b"sidecar"), wire.RefusedFrame(b"{}")]
    with pytest.raises(ServerProtocolError):
        list(wire.decode_snapshots(data[:-1]))
