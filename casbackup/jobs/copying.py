"""Copying trees from one repository to a session of another, moving only what is missing there.

Each wanted blob becomes a ``Parcel``, which goes through two questions: is it missing at the destination? If so, what
is it? A tree node that came makes parcels of its children. It is sent when all of them are settled, so children come
before the nodes that name them; what is present needs no look below it, for then all of that is present too.

Links have long round trips, so questions are about many blobs at once, and several are under way. Parcels wait in a
queue for each question and level; whoever has nothing to do takes a batch. So batches are as large as the waiting made
them, and grow where the link is slow. Half of the workers *scout*: they walk the trees, deepest level first, which
bounds what is in memory. The others *move* chunks. Scouts pause while enough chunks are waiting to be moved, and help
moving them.

Blobs are copied as they are stored. Each is verified before it is sent, so damage is not spread: it is the loss of
the goals that need the blob, and the others go on.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from casbackup.codec.codec import Codec
from casbackup.codec.records import require_checksum
from casbackup.errors import BlobMissing, DataDamage, NodeInvalid
from casbackup.ids import ZERO_ID, BlobId
from casbackup.jobs.ratelimit import NO_LIMIT, RateLimit
from casbackup.limits import MAX_LEVEL
from casbackup.progress import NoProgress, Progress
from casbackup.spec.manifest import Manifest
from casbackup.spec.node import Inner, Leaf
from casbackup.spec.record import BlobKind, Record
from casbackup.store.blobstore import Fetched
from casbackup.store.writer import StoredBytes
from casbackup.tree.builder import level_of
from casbackup.tree.reader import checked_node, span_of
from casbackup.units import MiB
from casbackup.workers import run_workers

WORKERS = 12
"""With round trips of 100 ms, so many requests of 2 to 4 MiB are more than 1 Gbit/s can carry meanwhile."""

GOALS_AT_ONCE = 32
"""A server is told with each request for records which snapshots are being read: so many fit."""

CHUNK = -1
"""Level of what has nothing below it: chunks, and configs."""

_ASKED = 16_384
_LEAVES = 64
_INNER_NODES = 32
_CHUNKS = 128
_CHUNKS_BYTES = 4 * MiB
"""Content of the chunks of one request; less is stored and sent."""
_ENOUGH_WAITING = 8192
"""Chunks waiting to be moved, some 300 MB: enough for the next seconds."""
_MOST_PARCELS = 250_000
"""No further nodes are opened beside others while there are so many, which takes 100 MB."""
_NAMED_LOSSES = 16


class Wanted(NamedTuple):
    """A blob that a goal wants. ``size_bytes``: of a config. ``span_bytes``: of a disk, whose root it is."""

    id: BlobId
    level: int
    size_bytes: int = 0
    span_bytes: int = 0

    @property
    def kind(self) -> BlobKind:
        return BlobKind.CONFIG if self.level == CHUNK else BlobKind.NODE


class Goal(Protocol):
    """Several blobs with all below them. Called from any worker.

    ``wanted`` are known to be missing at the destination; looked at when ``begin`` has returned.
    """

    wanted: Sequence[Wanted]

    def begin(self) -> None:
        """It is about to be copied."""

    def end(self, tally: Tally, losses: Sequence[DataDamage]) -> None:
        """All has been handed over; with ``losses``, all but what is lost, and what is above that."""


def wanted_of(manifest: Manifest) -> list[Wanted]:
    """All that a snapshot needs, by its roots."""
    disks = [Wanted(d.root, level_of(d.size_bytes), span_bytes=d.size_bytes) for d in manifest.disks]
    return disks + [Wanted(c.id, CHUNK, size_bytes=c.size_bytes) for c in manifest.configs]


class Source(Protocol):
    """Where records come from."""

    @property
    def codec(self) -> Codec: ...

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        """As ``Peer.fetch``."""


class Destination(Protocol):
    """Where they go: the part of ``PeerSession`` that this needs."""

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]: ...

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None: ...


@dataclass(slots=True)
class Tally:
    """What was sent. ``stored_bytes``: with headers, as in packs."""

    chunks: int = 0
    nodes: int = 0
    stored_bytes: int = 0

    @property
    def blobs(self) -> int:
        return self.chunks + self.nodes


@dataclass(eq=False, slots=True)
class _Target:
    """A goal on its way: ``pending`` of its blobs are not settled."""

    goal: Goal
    pending: int = 0
    losses: list[DataDamage] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


@dataclass(eq=False, slots=True)
class _Parcel:
    """A blob that is wanted and not settled. ``owner`` wanted it first.

    ``size_bytes``: content that a chunk must have at least. ``span_bytes``: what of disks it stands for, for the
    progress. ``record``, ``pending`` and ``losses`` are about a node that was fetched and whose children are not.
    """

    id: BlobId
    kind: BlobKind
    level: int
    owner: _Target
    size_bytes: int = 0
    span_bytes: int = 0
    above: list[_Parcel | _Target] = field(default_factory=list)
    record: Record | None = None
    pending: int = 0
    losses: list[DataDamage] = field(default_factory=list)


class _Child(NamedTuple):
    """Something named by a node or a goal; ``size_bytes`` and ``span_bytes`` as in ``_Parcel``."""

    id: BlobId
    size_bytes: int
    span_bytes: int


_Answer = Record | DataDamage


class Copier:
    """Copies goals. Use once."""

    def __init__(
        self,
        source: Source,
        destination: Destination,
        *,
        limit: RateLimit = NO_LIMIT,
        progress: Progress | None = None,
        only_count: bool = False,
    ) -> None:
        """``only_count``: chunks are not fetched but counted with their plain bytes. The destination, to which tree
        nodes are sent all the same, is expected to keep nothing.
        """
        self._source = source
        self._destination = destination
        self._limit = limit
        self._progress = progress or NoProgress()
        self._only_count = only_count
        self._changed = threading.Condition()
        self._parcels: dict[BlobId, _Parcel] = {}
        self._unasked: dict[int, deque[_Parcel]] = {level: deque() for level in range(CHUNK, MAX_LEVEL + 1)}
        self._unfetched: dict[int, deque[_Parcel]] = {level: deque() for level in range(CHUNK, MAX_LEVEL + 1)}
        self._unbegun: deque[Goal] = deque()
        self._complete: deque[_Target] = deque()
        self._arrived: set[BlobId] = set()
        """Of what goals want, so that another goal does not want it again."""
        self._begun = 0
        self._busy = 0
        self._stop = threading.Event()

    def run(self, goals: Iterable[Goal]) -> None:
        """Copy all goals, begun in their order; returns when all have ended.

        :raise CasbackupError: when the source or the destination fails, or a goal's own methods do.
        """
        self._unbegun.extend(goals)
        numbers = itertools.count()

        def work(stop: threading.Event) -> None:
            self._stop = stop
            moves_first = next(numbers) % 2 == 1
            while (action := self._next(moves_first=moves_first)) is not None:
                try:
                    action()
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()

        run_workers(work, WORKERS)

    # --- what to do next

    def _next(self, *, moves_first: bool) -> Callable[[], None] | None:
        """Something to do, waiting for it if need be; None when there will be nothing more."""
        with self._changed:
            while not self._stop.is_set():
                action = self._chosen(moves_first=moves_first)
                if action is not None:
                    self._busy += 1
                    return action
                if not self._busy:
                    return None
                self._changed.wait(0.2)
        return None

    def _chosen(self, *, moves_first: bool) -> Callable[[], None] | None:
        if moves_first or len(self._unfetched[CHUNK]) >= _ENOUGH_WAITING:
            return self._moving() or self._scouting()
        return self._scouting() or self._moving()

    def _moving(self) -> Callable[[], None] | None:
        waiting = self._unfetched[CHUNK]
        if not waiting:
            return None
        batch: list[_Parcel] = []
        size = 0
        while waiting and len(batch) < _CHUNKS and size < _CHUNKS_BYTES:
            batch.append(waiting.popleft())
            size += batch[-1].size_bytes
        return lambda: self._count_only(batch) if self._only_count else self._move(batch)

    def _scouting(self) -> Callable[[], None] | None:
        if self._complete:
            target = self._complete.popleft()
            return lambda: self._end(target)
        if len(self._unfetched[CHUNK]) >= _ENOUGH_WAITING:
            return None
        for level in range(CHUNK, MAX_LEVEL + 1):
            if level != CHUNK and self._unfetched[level]:
                if self._busy and len(self._parcels) >= _MOST_PARCELS:
                    return None
                batch = _taken(self._unfetched[level], _LEAVES if level == 0 else _INNER_NODES)
                return lambda: self._open_nodes(batch)
            if self._unasked[level]:
                asked = _taken(self._unasked[level], _ASKED)
                return lambda: self._ask(asked)
        if self._unbegun and self._begun < GOALS_AT_ONCE:
            self._begun += 1
            goal = self._unbegun.popleft()
            return lambda: self._begin(goal)
        return None

    # --- doing it

    def _begin(self, goal: Goal) -> None:
        goal.begin()
        target = _Target(goal)
        with self._changed:
            for wanted in goal.wanted:
                if wanted.id in self._arrived:
                    self._progress.advance(done=wanted.span_bytes)
                    continue
                parcel = self._want(target, wanted.kind, wanted.level, target, wanted)
                if parcel is not None:
                    self._unfetched[wanted.level].append(parcel)
            if not target.pending:
                self._complete.append(target)

    def _end(self, target: _Target) -> None:
        target.goal.end(target.tally, target.losses)
        with self._changed:
            self._begun -= 1

    def _ask(self, batch: Sequence[_Parcel]) -> None:
        missing = self._destination.missing([parcel.id for parcel in batch])
        with self._changed:
            self._unfetched[batch[0].level].extend(parcel for parcel in batch if parcel.id in missing)
            self._changed.notify_all()
        self._settle([parcel for parcel in batch if parcel.id not in missing])

    def _open_nodes(self, batch: Sequence[_Parcel]) -> None:
        """Fetch nodes, and want what is below them."""
        lost: list[_Parcel] = []
        complete: list[_Parcel] = []
        for parcel, answer in self._fetched(batch):
            try:
                record = _fitting(parcel, answer)
                require_checksum(record)
                node = checked_node(self._source.codec.decode(record), parcel.level)
            except DataDamage as damage:
                parcel.losses.append(damage)
                lost.append(parcel)
            else:
                if self._open(parcel, record, node):
                    complete.append(parcel)
        self._settle(lost)
        self._hand_over(complete)

    def _open(self, parcel: _Parcel, record: Record, node: Leaf | Inner) -> bool:
        """Wait for the children; True when there are none that are not settled."""
        with self._changed:
            parcel.record = record._replace(payload=bytes(record.payload))  # not the memory of all that was fetched
            if isinstance(node, Leaf):
                self._want_below(parcel, BlobKind.CHUNK, _chunks_of(node))
                return not parcel.pending
            span_bytes, parcel.span_bytes = parcel.span_bytes, 0
            children = list(_children_of(node, span_bytes))
            span_bytes -= sum(child.span_bytes for child in children)
            self._want_below(parcel, BlobKind.NODE, children)
        self._progress.advance(done=span_bytes)  # what is left of it is zero
        return False

    def _move(self, batch: Sequence[_Parcel]) -> None:
        """Fetch chunks, verify them, and hand them over."""
        records: list[Record] = []
        for parcel, answer in self._fetched(batch):
            try:
                record = _fitting(parcel, answer)
                self._source.codec.verify(record)
            except DataDamage as damage:
                parcel.losses.append(damage)
            else:
                records.append(record)
                self._count(parcel, record.total_bytes)
                self._limit.pass_on(record.total_bytes, self._stop)
        self._send(records)
        self._settle(batch)

    def _count_only(self, batch: Sequence[_Parcel]) -> None:
        for parcel in batch:
            self._count(parcel, parcel.size_bytes)
        self._settle(batch)

    def _fetched(self, batch: Sequence[_Parcel]) -> Iterator[tuple[_Parcel, _Answer]]:
        by_id = {parcel.id: parcel for parcel in batch}
        for blob_id, record in self._source.fetch(list(by_id)):
            parcel = by_id.pop(blob_id, None)
            if parcel is not None:
                yield parcel, record
        for parcel in by_id.values():
            yield parcel, BlobMissing(f"the source does not answer about blob {parcel.id.hex()[:16]}")

    def _hand_over(self, nodes: Sequence[_Parcel]) -> None:
        """Send nodes whose children are settled, those above them that are complete by that, and so on."""
        while nodes:
            records: list[Record] = []
            for node in nodes:
                if node.record is not None and not node.losses:
                    records.append(node.record)
                    self._count(node, node.record.total_bytes)
                    self._limit.pass_on(node.record.total_bytes, self._stop)
            self._send(records)
            nodes = self._settled(nodes)

    def _settle(self, parcels: Sequence[_Parcel]) -> None:
        self._hand_over(self._settled(parcels))

    def _send(self, records: Sequence[Record]) -> None:
        if records:
            self._destination.send_soon(records, _nothing_more)

    # --- bookkeeping, all under the lock

    def _want(
        self, above: _Parcel | _Target, kind: BlobKind, level: int, owner: _Target, child: _Child | Wanted
    ) -> _Parcel | None:
        """Make ``above`` wait for a blob; gives its parcel if it is a new one, which is in no queue yet."""
        known = self._parcels.get(child.id)
        parcel = known or _Parcel(child.id, kind, level, owner)
        self._parcels[child.id] = parcel
        parcel.size_bytes = max(parcel.size_bytes, child.size_bytes)
        parcel.span_bytes += child.span_bytes
        parcel.above.append(above)
        above.pending += 1
        return parcel if known is None else None

    def _want_below(self, parcel: _Parcel, kind: BlobKind, children: Iterable[_Child]) -> None:
        for child in children:
            new = self._want(parcel, kind, parcel.level - 1, parcel.owner, child)
            if new is not None:
                self._unasked[new.level].append(new)

    def _settled(self, parcels: Sequence[_Parcel]) -> list[_Parcel]:
        """These are settled: present, handed over, or lost. Gives the nodes that have nothing pending now."""
        ready: list[_Parcel] = []
        done_bytes = 0
        with self._changed:
            for parcel in parcels:
                del self._parcels[parcel.id]
                done_bytes += parcel.span_bytes
                for above in parcel.above:
                    above.pending -= 1
                    new = [loss for loss in parcel.losses if loss not in above.losses]
                    above.losses += new[: _NAMED_LOSSES - len(above.losses)]
                    if isinstance(above, _Target):
                        if not parcel.losses:
                            self._arrived.add(parcel.id)
                        if not above.pending:
                            self._complete.append(above)
                    elif not above.pending:
                        ready.append(above)
            self._changed.notify_all()
        self._progress.advance(done=done_bytes)
        return ready

    def _count(self, parcel: _Parcel, stored_bytes: int) -> None:
        with self._changed:
            tally = parcel.owner.tally
            tally.stored_bytes += stored_bytes
            if parcel.level == CHUNK:
                tally.chunks += 1
            else:
                tally.nodes += 1
        self._progress.advance(new=stored_bytes)


def _chunks_of(leaf: Leaf) -> Iterator[_Child]:
    """The distinct chunks of a leaf, and how far it reaches into each."""
    reach: dict[BlobId, int] = {}
    for extent in leaf.extents:
        if not extent.is_zero:
            reach[extent.id] = max(reach.get(extent.id, 0), extent.skip + extent.length)
    for chunk, size_bytes in reach.items():
        yield _Child(chunk, size_bytes, 0)


def _children_of(node: Inner, span_bytes: int) -> Iterator[_Child]:
    """The distinct children of a node that stands for so many bytes of disk."""
    spans: dict[BlobId, int] = {}
    span = span_of(node.level - 1)
    for number, child in enumerate(node.children):
        if child != ZERO_ID:
            spans[child] = spans.get(child, 0) + max(0, min(span, span_bytes - number * span))
    for child, part in spans.items():
        yield _Child(child, 0, part)


def _fitting(parcel: _Parcel, answer: _Answer) -> Record:
    """The record, if it is what the nodes that name it say; it is not verified yet.

    :raise DataDamage: the answer itself, or when it is something else.
    """
    if isinstance(answer, DataDamage):
        raise answer
    if answer.kind != parcel.kind or answer.plain_length < parcel.size_bytes:
        raise NodeInvalid(f"blob {parcel.id.hex()[:16]} is not what a tree node says that it is")
    return answer


def _taken(queue: deque[_Parcel], most: int) -> list[_Parcel]:
    return [queue.popleft() for _ in range(min(most, len(queue)))]


def _nothing_more(_stored: StoredBytes) -> None: ...
