"""Reading stored blobs and verifying every byte: header against the index, checksum, and content against the id.

Threads take runs of records that lie together. A sound record is told by a few comparisons and two hashes, all in C;
only one that is not is looked at again, to say what is wrong with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from casbackup.codec.records import parse_record
from casbackup.errors import BlobDamaged, DataDamage, PackDamaged
from casbackup.ids import ID_BYTES, BlobId
from casbackup.progress import Progress
from casbackup.repository.indextable import IndexTable
from casbackup.repository.repository import Repository
from casbackup.spec.indexdb import BlobEntry, PackRow, verified_at
from casbackup.spec.record import HEADER_BYTES
from casbackup.store.index import Transaction
from casbackup.workers import run_workers, worker_count

_READ_BYTES = 4 * 1024 * 1024
_MAX_GAP_BYTES = 64 * 1024
_NOTE_EVERY = 20_000


class _Place(NamedTuple):
    """A blob and where the index says it is."""

    id: BlobId
    entry: BlobEntry

    @property
    def end(self) -> int:
        return self.entry.offset + HEADER_BYTES + self.entry.stored_length


class Scrubber:
    """Verifies blobs, and notes it in the index now and then, so that what was done counts even if interrupted."""

    def __init__(
        self, repository: Repository, table: IndexTable, progress: Progress, *, time_budget_s: float | None = None
    ) -> None:
        self._repository = repository
        self._table = table
        self._progress = progress
        self._packs = repository.store.pack_rows()
        self._clock = repository.clock
        self._deadline_s = None if time_budget_s is None else self._clock.monotonic_s() + time_budget_s
        self._lock = threading.Lock()
        self._sound: list[BlobId] = []
        self.damaged: dict[BlobId, str] = {}
        self.verified_blobs = 0
        self.verified_bytes = 0

    def run(self, rows: npt.NDArray[np.int64]) -> None:
        """Verify these rows of the table, in their order as far as runs allow, until the time budget is used up."""
        runs = self._runs(rows)

        def work(stop: threading.Event) -> None:
            while not stop.is_set():
                with self._lock:
                    run = next(runs, None)
                if run is None or self._late():
                    return
                self._verify(self._places(rows[run]))

        run_workers(work, worker_count())
        self._note()

    def _late(self) -> bool:
        return self._deadline_s is not None and self._clock.monotonic_s() >= self._deadline_s

    def _runs(self, rows: npt.NDArray[np.int64]) -> Iterator[slice]:
        """Stretches of ``rows`` that lie together in a pack, up to 4 MiB each."""
        values = self._table.values[rows]
        packs, offsets, stored = (values[name].tolist() for name in ("pack", "offset", "stored"))
        first = end = 0
        for at, offset in enumerate(offsets):
            size = HEADER_BYTES + stored[at]
            together = packs[at] == packs[first] and 0 <= offset - end < _MAX_GAP_BYTES
            if at > first and not (together and offset + size - offsets[first] <= _READ_BYTES):
                yield slice(first, at)
                first = at
            end = offset + size
        if len(rows):
            yield slice(first, len(rows))

    def _places(self, rows: npt.NDArray[np.int64]) -> list[_Place]:
        ids = self._table.ids[rows].tobytes()
        entries = self._table.values[rows].tolist()
        return [
            _Place(BlobId(ids[at * ID_BYTES : (at + 1) * ID_BYTES]), BlobEntry(*entry))
            for at, entry in enumerate(entries)
        ]

    def _verify(self, run: Sequence[_Place]) -> None:
        start, end = run[0].entry.offset, run[-1].end
        pack = self._packs.get(run[0].entry.pack)
        data = self._read(pack, start, end - start) or b""
        sound: list[BlobId] = []
        sound_bytes = 0
        for place in run:
            if self._is_sound(data, start, place) or self._is_sound_alone(pack, place):
                sound.append(place.id)
                sound_bytes += HEADER_BYTES + place.entry.stored_length
        self._progress.advance(done=end - start)
        with self._lock:
            self._sound += sound
            self.verified_blobs += len(sound)
            self.verified_bytes += sound_bytes
            full = len(self._sound) >= _NOTE_EVERY
        if full:
            self._note()

    def _is_sound(self, data: bytes, start: int, place: _Place) -> bool:
        """Is the blob sound in ``data``, which begins at byte ``start`` of its pack?"""
        entry = place.entry
        return self._repository.codec.is_sound(
            data, entry.offset - start, entry.kind, entry.flags, entry.stored_length, entry.plain_length, place.id
        )

    def _is_sound_alone(self, pack: PackRow | None, place: _Place) -> bool:
        """Read a blob by itself (its neighbours may have spoilt the run) and note what is wrong with it.

        If a gc has moved or removed it since the index was read, it is nobody's business: neither sound nor damaged.
        """
        offset = place.entry.offset
        data = self._read(pack, offset, place.end - offset)
        if data is not None and self._is_sound(data, offset, place):
            return True
        problem = "cannot be read" if data is None or pack is None else self._problem(pack, place, data)
        now = self._repository.store.entries([place.id]).get(place.id)
        if now is not None and (now.pack, now.offset) == (place.entry.pack, offset):
            with self._lock:
                self.damaged[place.id] = problem
        return False

    def _problem(self, pack: PackRow, place: _Place, data: bytes) -> str:
        offset = place.entry.offset
        try:
            record = parse_record(data, at=f"{pack.pack}:{offset}")
            if record.id != place.id:
                raise BlobDamaged(f"another blob, {record.id.hex()[:16]}, is in its place")
            self._repository.codec.verify_content(record)
        except DataDamage as error:
            return str(error)
        return f"the header of its record at {pack.pack}:{offset} is not as the index says"

    def _read(self, pack: PackRow | None, offset: int, length: int) -> bytes | None:
        if pack is None:
            return None
        try:
            return self._repository.store.storage.read(pack.pack, offset, length)
        except (PackDamaged, OSError, KeyError):
            return None

    def _note(self) -> None:
        """Write down when the sound ones were verified, and that formerly damaged ones are sound."""
        with self._lock:
            ids, self._sound = self._sound, []
        if not ids or self._repository.read_only:
            return
        blobs, with_key = self._repository.index.blobs, not self._repository.codec.is_blind
        now_s = self._clock.now_ms() // 1000

        def stamp(txn: Transaction) -> None:
            for blob_id in sorted(ids):
                value = txn.get(blob_id, db=blobs)
                if value is not None:
                    txn.put(blob_id, verified_at(value, now_s, with_key=with_key), db=blobs)

        self._repository.index.write(stamp)
