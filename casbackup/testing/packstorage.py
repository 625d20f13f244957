"""Conformance suite of the PackStorage port, and an implementation in memory.

    for name, check in PackStorageConformance(opened).checks():
        check()

``opened()`` returns a context manager that gives an empty storage. No test framework is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from casbackup.errors import PackDamaged
from casbackup.fs import Buffer
from casbackup.ids import PackId, new_pack_id
from casbackup.store.packstorage import PackAppender, PackInfo, PackStorage
from casbackup.units import KiB, MiB

Opened = Callable[[], AbstractContextManager[PackStorage]]


class PackStorageConformance:
    """All the checks of one implementation."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and function of each check."""
        for name in sorted(dir(self)):
            if name.startswith("check_"):
                yield name.removeprefix("check_"), getattr(self, name)

    def run(self) -> None:
        """All checks, one after the other."""
        for _name, check in self.checks():
            check()

    def check_an_empty_storage_lists_nothing(self) -> None:
        with self._opened() as storage:
            assert list(storage.list()) == []
            assert list(storage.foreign()) == []

    def check_what_was_synced_is_listed_and_read(self) -> None:
        with self._opened() as storage:
            pack = _stored(storage, [b"head", b"", memoryview(b"body"), bytearray(b"tail")])
            assert list(storage.list()) == [PackInfo(pack, 12)]
            assert storage.size_bytes(pack) == 12
            assert bytes(storage.read(pack, 0, 12)) == b"headbodytail"
            assert bytes(storage.read(pack, 4, 4)) == b"body"
            assert bytes(storage.read(pack, 12, 0)) == b""

    def check_many_buffers_keep_their_order(self) -> None:
        with self._opened() as storage:
            pieces = [bytes([n % 251]) * (n % 7) for n in range(5000)]
            pack = _stored(storage, pieces)
            whole = b"".join(pieces)
            assert bytes(storage.read(pack, 0, len(whole))) == whole

    def check_a_large_pack(self) -> None:
        with self._opened() as storage:
            block = bytes(range(256)) * 256
            pack = _stored(storage, [block] * 80)
            assert storage.size_bytes(pack) == 80 * 64 * KiB
            assert bytes(storage.read(pack, 3 * MiB - 5, 10)) == (block + block)[-5 + 64 * KiB :][:10]

    def check_buffers_belong_to_the_caller_again(self) -> None:
        with self._opened() as storage:
            buffer = bytearray(b"before")
            appender = storage.create(new_pack_id())
            appender.append([buffer])
            buffer[:] = b"after!"
            appender.sync()
            appender.close()
            assert bytes(storage.read(appender.pack, 0, 6)) == b"before"

    def check_appending_after_a_sync(self) -> None:
        with self._opened() as storage:
            appender = storage.create(new_pack_id())
            appender.append([b"first"])
            appender.sync()
            assert bytes(storage.read(appender.pack, 0, 5)) == b"first"
            if appender.can_continue:
                appender.append([b"second"])
                appender.sync()
                assert bytes(storage.read(appender.pack, 0, 11)) == b"firstsecond"
            appender.close()

    def check_closing_twice_is_harmless(self) -> None:
        with self._opened() as storage:
            appender = storage.create(new_pack_id())
            appender.append([b"x"])
            appender.sync()
            appender.close()
            appender.close()
            assert storage.size_bytes(appender.pack) == 1

    def check_reading_beyond_the_end_is_damage(self) -> None:
        with self._opened() as storage:
            pack = _stored(storage, [b"0123456789"])
            for offset, length in ((0, 11), (5, 6), (10, 1), (1000, 1)):
                assert _raises(PackDamaged, partial(storage.read, pack, offset, length))

    def check_an_unknown_pack_is_a_key_error(self) -> None:
        with self._opened() as storage:
            assert _raises(KeyError, lambda: storage.read(new_pack_id(), 0, 1))
            assert _raises(KeyError, lambda: storage.size_bytes(new_pack_id()))

    def check_deleting(self) -> None:
        with self._opened() as storage:
            kept, gone = _stored(storage, [b"kept"]), _stored(storage, [b"gone"])
            storage.read(gone, 0, 4)
            storage.delete(gone)
            assert [info.pack for info in storage.list()] == [kept]
            assert _raises(KeyError, lambda: storage.read(gone, 0, 4))
            assert _raises(KeyError, lambda: storage.size_bytes(gone))
            storage.delete(gone)
            storage.delete(new_pack_id())
            assert bytes(storage.read(kept, 0, 4)) == b"kept"

    def check_quarantine_takes_a_pack_out(self) -> None:
        with self._opened() as storage:
            kept, bad = _stored(storage, [b"kept"]), _stored(storage, [b"bad!"])
            storage.read(bad, 0, 4)
            assert storage.quarantine(bad)
            assert [info.pack for info in storage.list()] == [kept]
            assert _raises(KeyError, lambda: storage.read(bad, 0, 4))
            assert list(storage.foreign()) == []

    def check_several_packs_at_once(self) -> None:
        with self._opened() as storage:
            appenders = [storage.create(new_pack_id()) for _ in range(20)]
            for number, appender in enumerate(appenders):
                appender.append([bytes([number]) * (number + 1)])
            for appender in reversed(appenders):
                appender.sync()
                appender.close()
            assert {i.pack: i.size_bytes for i in storage.list()} == {a.pack: n + 1 for n, a in enumerate(appenders)}

    def check_reading_while_another_pack_is_written(self) -> None:
        with self._opened() as storage:
            pack = _stored(storage, [bytes(range(256)) * 64])
            wrong: list[int] = []

            def read() -> None:
                for offset in range(0, 16 * KiB - 256, 97):
                    expected = bytes((offset + n) % 256 for n in range(256))
                    if bytes(storage.read(pack, offset, 256)) != expected:
                        wrong.append(offset)

            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            for _ in range(20):
                _stored(storage, [b"z" * 1000])
            for thread in threads:
                thread.join()
            assert wrong == []
            assert len(list(storage.list())) == 21


class MemoryPackStorage:
    """Packs in a dictionary. ``appendable`` False: like an object store, whose objects end at ``sync``."""

    def __init__(self, *, appendable: bool = True) -> None:
        self._packs: dict[PackId, bytes] = {}
        self._appendable = appendable
        self.quarantined: dict[PackId, bytes] = {}

    def list(self) -> Iterator[PackInfo]:
        yield from [PackInfo(pack, len(data)) for pack, data in self._packs.items()]

    def create(self, pack: PackId) -> MemoryPackAppender:
        assert pack not in self._packs, f"pack {pack} is created twice"
        return MemoryPackAppender(self, pack, appendable=self._appendable)

    def read(self, pack: PackId, offset: int, length: int) -> bytes:
        data = self._packs[pack][offset : offset + length]
        if len(data) != length:
            raise PackDamaged(f"pack {pack} ends before byte {offset + length}")
        return data

    def size_bytes(self, pack: PackId) -> int:
        return len(self._packs[pack])

    def delete(self, pack: PackId) -> None:
        self._packs.pop(pack, None)

    def quarantine(self, pack: PackId) -> str:
        self.quarantined[pack] = self._packs.pop(pack)
        return f"quarantine/{pack}"

    def foreign(self) -> Iterator[str]:
        return iter(())

    def close(self) -> None:
        """Nothing is kept open."""

    def store(self, pack: PackId, content: bytes) -> None:
        """Put a pack's bytes, or replace them."""
        self._packs[pack] = content


class MemoryPackAppender:
    """A pack that appears, or grows, with each ``sync``."""

    def __init__(self, storage: MemoryPackStorage, pack: PackId, *, appendable: bool) -> None:
        self.pack = pack
        self.can_continue = appendable
        self._ended = False
        self._storage = storage
        self._content = bytearray()

    def append(self, buffers: Sequence[Buffer]) -> None:
        assert not self._ended, "appended to a pack that has ended"
        for buffer in buffers:
            self._content += buffer

    def sync(self) -> None:
        self._storage.store(self.pack, bytes(self._content))
        self._ended = not self.can_continue

    def close(self) -> None:
        """What was not synced is gone."""


def _stored(storage: PackStorage, buffers: Sequence[Buffer]) -> PackId:
    appender: PackAppender = storage.create(new_pack_id())
    appender.append(buffers)
    appender.sync()
    appender.close()
    return appender.pack


def _raises(kind: type[Exception], action: Callable[[], object]) -> bool:
    try:
        action()
    except kind:
        return True
    return False
