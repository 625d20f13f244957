"""Memory that is lent again only when nobody looks at it any more."""

from __future__ import annotations

from casbackup.limits import UPLOAD_BYTES
from casbackup_server.bodies import BodyMemory


def test_memory_is_used_again() -> None:
    memory = BodyMemory()
    with memory.lent(UPLOAD_BYTES) as first:
        first[:4] = b"mine"
    with memory.lent(100_000) as second:
        assert len(second) == 100_000
        assert second[:4] == b"mine"


def test_what_somebody_still_looks_at_is_not() -> None:
    memory = BodyMemory()
    with memory.lent(UPLOAD_BYTES) as body:
        body[:4] = b"mine"
        kept = body[:4]
    with memory.lent(UPLOAD_BYTES) as other:
        other[:4] = b"ours"
        assert kept == b"mine"


def test_two_at_once_are_apart() -> None:
    memory = BodyMemory()
    with memory.lent(UPLOAD_BYTES) as one, memory.lent(UPLOAD_BYTES) as two:
        one[:1], two[:1] = b"1", b"2"
        assert (one[:1], two[:1]) == (b"1", b"2")


def test_any_length_is_lent() -> None:
    memory = BodyMemory()
    for size in (0, 1, 70_000, UPLOAD_BYTES, 8 * UPLOAD_BYTES):
        with memory.lent(size) as body:
            assert len(body) == size
