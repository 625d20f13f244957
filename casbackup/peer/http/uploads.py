"""Sending records in the background: many to a request, several requests at once, nodes after what they name.

Records gather until they are about ``UPLOAD_BYTES``; then they go as one request from a thread of the pool. Requests
with tree nodes wait for all that were handed over before them, so that the children are there. At most
``UPLOADS_IN_FLIGHT`` requests are under way; then whoever wants to send waits. A request that was answered is durable
on the server.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from casbackup.ids import BlobId
from casbackup.limits import UPLOAD_BYTES, UPLOADS_IN_FLIGHT
from casbackup.spec.record import BlobKind, Record
from casbackup.store.writer import NOTHING_STORED, StoredBytes

Post = Callable[[Sequence[Record]], Sequence[bool]]
"""Sends records as one request; tells of each whether it was new."""

Then = Callable[[StoredBytes], None]

_MAX_NODES = 256
"""Nodes wait for the chunks before them: so many segments are sent between two such pauses."""
_REMEMBERED = 200_000
"""Ids of blobs that were sent, so that the server is not asked for them again: 25 MB."""


class _Call:
    """One call of ``add``: what it stored is known when all of its records were answered."""

    __slots__ = ("blobs", "plain_bytes", "stored_bytes", "then", "waiting")

    def __init__(self, waiting: int, then: Then) -> None:
        self.waiting = waiting
        self.then = then
        self.blobs = self.plain_bytes = self.stored_bytes = 0

    def answered(self, record: Record, *, new: bool) -> bool:
        """Was it the last one?"""
        if new:
            self.blobs += 1
            self.plain_bytes += record.plain_length
            self.stored_bytes += record.total_bytes
        self.waiting -= 1
        return not self.waiting

    def finish(self) -> None:
        self.then(StoredBytes(self.blobs, self.plain_bytes, self.stored_bytes))


_Entry = tuple[Record, _Call]


class Uploads:
    """The uploads of one session. ``add`` may be called from several threads.

    Two locks: ``_order`` is held by whoever hands over, while it waits for room too; ``_state`` never for long, so that
    uploads end meanwhile.
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        self._pool = ThreadPoolExecutor(UPLOADS_IN_FLIGHT, "upload")
        self._slots = threading.BoundedSemaphore(UPLOADS_IN_FLIGHT)
        self._order = threading.RLock()
        self._state = threading.Lock()
        self._data: list[_Entry] = []
        self._data_bytes = 0
        self._nodes: list[_Entry] = []
        self._under_way: set[Future[None]] = set()
        self._queued: set[BlobId] = set()
        self._sent: OrderedDict[BlobId, None] = OrderedDict()
        self._failure: BaseException | None = None

    def holds(self, blob_id: BlobId) -> bool:
        """Is it on its way, or known to have been sent?"""
        return blob_id in self._queued or blob_id in self._sent

    def add(self, records: Sequence[Record], then: Then) -> None:
        """Send them soon. ``then`` is called from any thread, before ``drain`` returns.

        :raise CasbackupError: when an earlier upload failed.
        """
        self.raise_failure()
        call = _Call(len(records), then)
        if not records:
            then(NOTHING_STORED)
        with self._order:
            with self._state:
                self._queued.update([record.id for record in records])
            for record in records:
                self._add(record, call)

    def drain(self) -> None:
        """All that was added is on the server, durably.

        :raise CasbackupError: when an upload failed.
        """
        with self._order:
            self._send_data()
            self._send_nodes()
        wait(self._all_under_way())
        self.raise_failure()

    def now(self, records: Sequence[Record]) -> StoredBytes:
        """Send them at once and wait, after all that was added before.

        :raise CasbackupError: why the server refuses one; what stands before a refused node is stored.
        """
        self.drain()
        stored = NOTHING_STORED
        for batch in _batches(records):
            stored = stored.plus(_counted(zip(batch, self._post(batch), strict=True)))
            self._remember(batch)
        return stored

    def forget(self) -> None:
        """What was sent may be gone: ask the server again."""
        with self._state:
            self._sent.clear()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Send nothing more; wait for what is under way."""
        with self._order:
            self._data, self._nodes, self._data_bytes = [], [], 0
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _add(self, record: Record, call: _Call) -> None:
        if record.kind == BlobKind.NODE:
            self._nodes.append((record, call))
            if len(self._nodes) >= _MAX_NODES:
                self._send_data()
                self._send_nodes()
            return
        self._data.append((record, call))
        self._data_bytes += record.total_bytes
        if self._data_bytes >= UPLOAD_BYTES:
            self._send_data()

    def _send_data(self) -> None:
        entries, self._data, self._data_bytes = self._data, [], 0
        if entries:
            self._submit(entries, ())

    def _send_nodes(self) -> None:
        """They wait for all that is under way, earlier nodes too."""
        entries, self._nodes = self._nodes, []
        if entries:
            self._submit(entries, self._all_under_way())

    def _submit(self, entries: list[_Entry], after: Sequence[Future[None]]) -> None:
        self._slots.acquire()
        future = self._pool.submit(self._upload, entries, after)
        with self._state:
            self._under_way.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._slots.release()
        with self._state:
            self._under_way.discard(future)

    def _all_under_way(self) -> list[Future[None]]:
        with self._state:
            return list(self._under_way)

    def _upload(self, entries: list[_Entry], after: Sequence[Future[None]]) -> None:
        """In a thread of the pool. Those before this one were begun before it, so waiting for them ends."""
        try:
            wait(after)
            if self._failure is not None:
                return
            records = [record for record, _ in entries]
            flags = self._post(records)
            self._remember(records)
            self._account(entries, flags)
        except BaseException as error:  # noqa: BLE001  raised in the thread that sends or waits next
            self._failure = error

    def _remember(self, records: Iterable[Record]) -> None:
        with self._state:
            for record in records:
                self._queued.discard(record.id)
                self._sent[record.id] = None
            while len(self._sent) > _REMEMBERED:
                self._sent.popitem(last=False)

    def _account(self, entries: Sequence[_Entry], flags: Sequence[bool]) -> None:
        with self._state:
            answers = zip(entries, flags, strict=True)
            finished = [call for (record, call), new in answers if call.answered(record, new=new)]
        for call in finished:
            call.finish()


def _batches(records: Sequence[Record]) -> Iterable[Sequence[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        if batch and size + record.total_bytes > UPLOAD_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += record.total_bytes
    if batch:
        yield batch


def _counted(answered: Iterable[tuple[Record, bool]]) -> StoredBytes:
    new = [record for record, is_new in answered if is_new]
    return StoredBytes(len(new), sum(r.plain_length for r in new), sum(r.total_bytes for r in new))
