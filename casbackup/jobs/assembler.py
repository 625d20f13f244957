"""The segment assembler: from ranges of disks in any order to whole segments, within a fixed amount of memory.

A producer gives every byte of every disk once, as data or as zeros, in whatever order it gets them: an archive of a
running VM, copy-before-write, a mirror over NBD. Data is gathered in pages of 64 KiB. A segment of 4 MiB goes to the
sink when it is complete, so that it is cut into chunks as a backup of the image would cut it. When all pages are
taken, the segment that was touched longest ago is handed on in parts: correct, but its chunks end where the parts do.
A segment whose first bytes come first is likely to come in order: while there is a whole buffer free its data goes
there, and is not copied again.

Pages hold what has arrived and nothing else, so early clusters scattered over a large disk take no more than their
own size, and zeros take nothing. Of a segment that was handed on in parts, what the sink wants to remember is kept,
for chunks some 50 bytes each. When a few segments wait for a worker, the producer waits, too: pages that are used
again soon are still in the processor's cache, and the rest of the memory is there for what comes early.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from struct import Struct
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from casbackup.buffers import ByteBuffer, aligned_buffer
from casbackup.fs import Buffer
from casbackup.limits import ASSEMBLER_BYTES, BLOCK_BYTES, SEGMENT_BYTES
from casbackup.units import KiB
from casbackup.workers import Crew, worker_count

PAGE_BYTES = 64 * KiB
UNIT_BYTES = 512
"""Ranges begin at multiples of this, and end there or at the end of the disk."""

_ZEROS = bytes(SEGMENT_BYTES)
_POLL_S = 0.2
_ARRIVED = Struct("<I")
_PART = Struct("<III")
"""Start, length, length of what the sink wants to remember."""


class Part(NamedTuple):
    """``length`` bytes of a segment from ``start``, which the sink has; ``memo`` is what it returned then."""

    start: int
    length: int
    memo: bytes


class SegmentSink(Protocol):
    """What takes the segments. Called from worker threads, for different segments at once.

    A ``buffer`` is lent for the call, has SEGMENT_BYTES, and ``view`` shows it. It holds zeros from ``length`` to the
    end of the last block.
    """

    def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
        """A complete segment, with some data in it."""

    def part(self, disk: int, number: int, start: int, buffer: ByteBuffer, view: memoryview, length: int) -> bytes:
        """``length`` bytes of a segment from ``start``, because memory is short. Returns what to remember."""

    def join(self, disk: int, number: int, length: int, parts: Sequence[Part]) -> None:
        """A segment of ``length`` that came in ``parts``, ascending, has all that will come of it.

        What is between them was given as zeros, or after ``finish`` with ``partial`` perhaps not at all.
        """

    def zeros(self, disk: int, offset: int, length: int) -> None:
        """Whole segments that are zero. Called by the producer."""


class _Whole(NamedTuple):
    """A buffer for all of a segment."""

    buffer: ByteBuffer
    view: memoryview

    @classmethod
    def new(cls) -> _Whole:
        buffer = aligned_buffer(SEGMENT_BYTES)
        return cls(buffer, memoryview(buffer))


class _Segment:
    """One that is incomplete: where its data lies, and what was handed on.

    ``runs``: [start, end) of data in pages, or in ``whole``.
    """

    __slots__ = ("arrived", "pages", "parts", "pending", "runs", "whole")

    def __init__(self, arrived: int = 0, parts: list[Part] | None = None) -> None:
        self.arrived = arrived
        self.parts = parts or []
        self.pages: dict[int, int] = {}
        self.runs: list[list[int]] = []
        self.whole: _Whole | None = None
        self.pending = 0

    def add_run(self, start: int, end: int) -> None:
        runs = self.runs
        if runs and runs[-1][1] == start:  # in order, as almost always
            runs[-1][1] = end
            return
        runs.append([start, end])
        if len(runs) > 1 and runs[-2][1] > start:
            self.runs = _merged(sorted(runs))

    def packed(self) -> bytes:
        parts = b"".join([_PART.pack(p.start, p.length, len(p.memo)) + p.memo for p in self.parts])
        return _ARRIVED.pack(self.arrived) + parts


class _Job(NamedTuple):
    """Data to hand on. ``segment`` None: it is all of it."""

    disk: int
    number: int
    pages: dict[int, int]
    whole: _Whole | None
    runs: list[list[int]]
    segment: _Segment | None


class Assembler:
    """Use it as a context: ``put`` and ``zeros`` from any number of threads, then ``finish``.

    With ``workers`` 0 the sink is called by the producer, of which there may be one only then; what comes in
    ascending order reaches the sink in that order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        sink: SegmentSink,
        *,
        budget_bytes: int = ASSEMBLER_BYTES,
        workers: int | None = None,
    ) -> None:
        """``sizes``: of the disks, in bytes. ``budget_bytes``: for pages and all other buffers together."""
        self._sizes = list(sizes)
        self._sink = sink
        self._workers = worker_count() if workers is None else workers
        spare_bytes = budget_bytes - self._workers * SEGMENT_BYTES
        self._wholes = [_Whole.new() for _ in range(_whole_count(spare_bytes, self._workers))]
        pages = max(1, (spare_bytes - len(self._wholes) * SEGMENT_BYTES) // PAGE_BYTES)
        memory = memoryview(mmap.mmap(-1, pages * PAGE_BYTES))
        self._pages = [memory[n * PAGE_BYTES : (n + 1) * PAGE_BYTES] for n in range(pages)]
        self._free = list(range(pages - 1, -1, -1))
        self._open: OrderedDict[tuple[int, int], _Segment] = OrderedDict()
        self._packed: dict[tuple[int, int], bytes] = {}
        self._last: tuple[int, int] | None = None
        self._jobs: deque[_Job] = deque()
        self._most_waiting = 2 * self._workers
        self._under_way = 0
        self._ending = False
        self._condition = threading.Condition()
        self._crew = Crew(self._work, self._workers)
        self._inline: _Whole | None = None

    def put(self, disk: int, offset: int, data: Buffer) -> None:
        """``data`` stands at ``offset``; it is copied. Waits while there is no room.

        Errors of the sink come out here, or in ``finish``.
        """
        view = memoryview(data).cast("B") if isinstance(data, memoryview) else memoryview(data)
        with self._condition:
            while view:
                if len(self._jobs) > self._most_waiting:
                    self._check()
                    self._condition.wait(_POLL_S)
                    continue
                number, start = divmod(offset, SEGMENT_BYTES)
                stored = self._store(disk, number, start, view)
                offset += stored
                view = view[stored:]

    def zeros(self, disk: int, offset: int, length: int) -> None:
        """``length`` bytes from ``offset`` are zero. Costs the same for a page and for a terabyte."""
        end = offset + length
        with self._condition:
            self._check()
            while offset < end:
                number, start = divmod(offset, SEGMENT_BYTES)
                whole_end = end if end == self._sizes[disk] else end // SEGMENT_BYTES * SEGMENT_BYTES
                if start == 0 and whole_end > offset:
                    self._sink.zeros(disk, offset, whole_end - offset)
                    offset = whole_end
                else:
                    stop = min(end, (number + 1) * SEGMENT_BYTES)
                    self._zeros_within(disk, number, stop - offset)
                    offset = stop

    def end_stream(self, disk: int, size_bytes: int) -> None:
        """Nothing more comes of a disk that was given in order, and of whose size only a bound was known before."""
        with self._condition:
            self._sizes[disk] = size_bytes
            key = disk, size_bytes // SEGMENT_BYTES
            segment = self._open.get(key)
            if segment is not None and segment.arrived == self._length(*key):
                self._complete(key, segment)

    def finish(self, *, partial: bool = False) -> None:
        """Everything was given: wait until the sink has it. ``partial``: segments may lack some of their bytes."""
        with self._condition:
            if partial:
                self._hand_on_all()
            assert partial or not self._incomplete(), "segments are incomplete"
            self._ending = True
            self._condition.notify_all()
        self._crew.join()
        for (disk, number), packed in self._packed.items():
            self._sink.join(disk, number, self._length(disk, number), sorted(_unpacked(packed).parts))
        self._packed.clear()

    def __enter__(self) -> Self:
        self._crew.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._condition:
            self._ending = True
            self._jobs.clear()
            self._condition.notify_all()
        self._crew.__exit__(kind, error, trace)

    # --- the producer's side; the condition is held

    def _store(self, disk: int, number: int, start: int, data: memoryview) -> int:
        """Copy what belongs into one page, or one segment; returns how much.

        0 when room had to be made, and all may have changed meanwhile.
        """
        key = disk, number
        segment = self._segment(key)
        if start == 0 and not segment.arrived and self._wholes:
            segment.whole = self._wholes.pop()
        if segment.whole is not None:
            length = min(SEGMENT_BYTES - start, len(data))
            segment.whole.view[start : start + length] = data[:length]
        else:
            length = self._store_in_page(segment, start, data)
        if length:
            segment.add_run(start, start + length)
            segment.arrived += length
            if segment.arrived == self._length(disk, number):
                self._complete(key, segment)
        return length

    def _store_in_page(self, segment: _Segment, start: int, data: memoryview) -> int:
        page, first = divmod(start, PAGE_BYTES)
        place = segment.pages.get(page)
        if place is None:
            if not self._free:
                self._make_room()
                return 0
            place = segment.pages[page] = self._free.pop()
        length = min(PAGE_BYTES - first, len(data))
        self._pages[place][first : first + length] = data[:length]
        return length

    def _segment(self, key: tuple[int, int]) -> _Segment:
        segment = self._open.get(key)
        if segment is None:
            self._check()
            segment = self._open[key] = _unpacked(self._packed.pop(key, b""))
        elif key != self._last:
            self._open.move_to_end(key)
        self._last = key
        return segment

    def _zeros_within(self, disk: int, number: int, length: int) -> None:
        key = disk, number
        segment = self._open.get(key)
        if segment is None:
            segment = _unpacked(self._packed.pop(key, b""))
        segment.arrived += length
        if segment.arrived == self._length(disk, number):
            self._complete(key, segment)
        elif key not in self._open:
            self._packed[key] = segment.packed()

    def _complete(self, key: tuple[int, int], segment: _Segment) -> None:
        disk, number = key
        if segment.parts or segment.pending:
            self._hand_on_part(key, segment)
        elif segment.runs:
            self._open.pop(key, None)
            self._enqueue(_Job(disk, number, segment.pages, segment.whole, segment.runs, None))
        else:
            self._open.pop(key, None)
            self._sink.zeros(disk, number * SEGMENT_BYTES, self._length(disk, number))

    def _hand_on_part(self, key: tuple[int, int], segment: _Segment) -> None:
        """Hand on what is in memory. The segment stays open until the sink has it."""
        self._open[key] = segment
        job = _Job(*key, segment.pages, segment.whole, segment.runs, segment)
        segment.pages, segment.whole, segment.runs = {}, None, []
        segment.pending += 1
        self._enqueue(job)

    def _make_room(self) -> None:
        """Returns when there may be a free page."""
        self._check()
        if self._under_way < max(1, self._workers):  # no worker is about to free some: give them work
            for key, segment in self._open.items():
                if segment.pages:
                    self._hand_on_part(key, segment)
                    break
        if self._workers:
            self._condition.wait(_POLL_S)

    def _hand_on_all(self) -> None:
        for key, segment in list(self._open.items()):
            if segment.runs:
                self._hand_on_part(key, segment)

    def _incomplete(self) -> bool:
        return bool(self._packed) or any(s.arrived < self._length(*key) for key, s in self._open.items())

    def _enqueue(self, job: _Job) -> None:
        self._under_way += 1
        if not self._workers:
            self._inline = self._inline or _Whole.new()
            self._do(job, self._inline)
            return
        self._jobs.append(job)
        self._condition.notify_all()

    def _check(self) -> None:
        self._crew.check()
        assert not self._ending, "the assembler was ended"

    def _length(self, disk: int, number: int) -> int:
        return min(SEGMENT_BYTES, self._sizes[disk] - number * SEGMENT_BYTES)

    # --- the workers' side

    def _work(self, stop: threading.Event) -> None:
        own = _Whole.new()
        while (job := self._next_job(stop)) is not None:
            self._do(job, own)

    def _next_job(self, stop: threading.Event) -> _Job | None:
        with self._condition:
            while not stop.is_set():
                if self._jobs:
                    return self._jobs.popleft()
                if self._ending:
                    return None
                self._condition.wait(_POLL_S)
        return None

    def _do(self, job: _Job, own: _Whole) -> None:
        if job.segment is not None:
            parts = [self._hand_on(job, start, end, own) for start, end in job.runs]
            self._release(job)
            self._settle(job.disk, job.number, job.segment, parts)
        elif job.whole is not None:
            self._hand_on_whole(job, job.whole)
            self._release(job)
        else:
            self._gather_all(job, own.view)
            self._release(job)
            self._hand_on_whole(job, own)

    def _hand_on_whole(self, job: _Job, whole: _Whole) -> None:
        length = self._length(job.disk, job.number)
        position = 0
        for start, end in job.runs:
            _clear(whole.view, position, start)
            position = end
        _clear(whole.view, position, _padded(length))
        self._sink.segment(job.disk, job.number, whole.buffer, whole.view, length)

    def _gather_all(self, job: _Job, view: memoryview) -> None:
        for start, end in job.runs:
            self._gather(job, start, end, view[start:end])

    def _hand_on(self, job: _Job, start: int, end: int, own: _Whole) -> Part:
        length = end - start
        self._gather(job, start, end, own.view[:length])
        _clear(own.view, length, _padded(length))
        return Part(start, length, self._sink.part(job.disk, job.number, start, own.buffer, own.view, length))

    def _gather(self, job: _Job, start: int, end: int, target: memoryview) -> None:
        if job.whole is not None:
            target[:] = job.whole.view[start:end]
            return
        position = start
        while position < end:
            page, first = divmod(position, PAGE_BYTES)
            stop = min(end, (page + 1) * PAGE_BYTES)
            target[position - start : stop - start] = self._pages[job.pages[page]][first : first + stop - position]
            position = stop

    def _release(self, job: _Job) -> None:
        with self._condition:
            self._under_way -= 1
            self._free += job.pages.values()
            if job.whole is not None:
                self._wholes.append(job.whole)
            self._condition.notify_all()

    def _settle(self, disk: int, number: int, segment: _Segment, parts: list[Part]) -> None:
        """Remember parts that the sink has now; the last of a segment has them joined."""
        key = disk, number
        length = self._length(disk, number)
        with self._condition:
            segment.parts += parts
            segment.pending -= 1
            if segment.pending or segment.runs:
                return
            del self._open[key]
            if segment.arrived < length:
                self._packed[key] = segment.packed()
                return
        self._sink.join(disk, number, length, sorted(segment.parts))


def _whole_count(spare_bytes: int, workers: int) -> int:
    """So many that workers, queue and a few disks have one each, in at most half of the memory."""
    return min(4 * workers + 2, spare_bytes // SEGMENT_BYTES // 2)


def _unpacked(packed: bytes) -> _Segment:
    if not packed:
        return _Segment()
    parts: list[Part] = []
    position = _ARRIVED.size
    while position < len(packed):
        start, length, memo_length = _PART.unpack_from(packed, position)
        position += _PART.size
        parts.append(Part(start, length, packed[position : position + memo_length]))
        position += memo_length
    return _Segment(_ARRIVED.unpack_from(packed)[0], parts)


def _merged(runs: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for run in runs:
        if merged and merged[-1][1] == run[0]:
            merged[-1][1] = run[1]
        else:
            merged.append(run)
    return merged


def _padded(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def _clear(view: memoryview, start: int, end: int) -> None:
    if start < end:
        view[start:end] = _ZEROS[: end - start]
