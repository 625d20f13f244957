"""The rules by which gc and sessions stay apart (``docs/architecture.md``), tried in random interleavings.

A model of the rules, not of the code: it shows that they suffice, and that none of them is superfluous. Times,
packs and bytes do not occur. Each step of a session and each transaction of gc is atomic; anything may happen
in between.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

T = TypeVar("T")
Steps = Generator[None, None, T]

CHUNKS = ("x", "y")
NAMES = {
    "leaf1": ["x"],
    "leaf2": ["x", "y"],
    "leaf3": ["y"],
    "inner1": ["leaf1", "leaf2"],
    "inner2": ["leaf2", "leaf3"],
}
"""What each node names."""
ROOTS = ("inner1", "inner2", "leaf1")

NO_EPOCH = 10**9


def below(blobs: Iterable[str]) -> set[str]:
    """The blobs and all that is below them."""
    seen: set[str] = set()
    todo = list(blobs)
    while todo:
        blob = todo.pop()
        if blob not in seen:
            seen.add(blob)
            todo += NAMES.get(blob, ())
    return seen


@dataclass
class Entry:
    owner: int
    dying: int = 0


@dataclass
class Session:
    number: int
    epoch: int = 0
    active: bool = True
    root: str = ""
    todo: list[str] = field(default_factory=list)
    """Nodes to ask for, children first."""
    sending: tuple[str, list[str]] | None = None
    """A node that is missing, and those of its chunks that are."""
    pending: list[str] = field(default_factory=list)
    """Sent, not in the index yet."""


class Refused(Exception):
    """A session may not name what it was told is there: the rule *naming* saw that another was broken."""


class World:
    """A repository, its sessions, and a gc that may be under way. ``without`` names a rule that is broken."""

    def __init__(self, seed: str, without: str = "") -> None:
        self.random = random.Random(seed)
        self.without = without
        self.blobs: dict[str, Entry] = {}
        self.sessions: dict[int, Session] = {}
        self.snapshots: list[str] = []
        self.epoch = self.attached = self.opened = 0
        self.gc: Steps[None] | None = None
        self.key_order = [*CHUNKS, *NAMES]
        self.random.shuffle(self.key_order)

    def run(self, steps: int) -> set[str]:
        """What some snapshot has lost after so many steps."""
        for _ in range(steps):
            self.step()
            lost = below(self.snapshots) - self.blobs.keys()
            if lost:
                return lost
        return set()

    def step(self) -> None:
        if self.gc is None and self.random.random() < 0.1:
            self.gc = self.collect()
        if self.gc is None or self.random.random() < 0.4:
            self.user_step()
        elif self.random.random() < 0.02:
            self.gc = None  # killed
        else:
            try:
                next(self.gc)
            except StopIteration:
                self.gc = None

    # --- sessions

    def user_step(self) -> None:
        active = [s for s in self.sessions.values() if s.active]
        parked = [s for s in self.sessions.values() if not s.active]
        kind = self.random.random()
        if kind < 0.15 and len(active) < 2:
            self.opened += 1
            self.sessions[self.opened] = self.attach(Session(self.opened))
        elif kind < 0.6 and active:
            self.backup_step(self.random.choice(active))
        elif kind < 0.7 and active:
            self.flush(self.random.choice(active))
        elif kind < 0.82 and active:
            self.stop(self.random.choice(active), drop=kind >= 0.76)
        elif kind < 0.88 and parked:
            self.attach(self.random.choice(parked))
        elif kind < 0.94 and parked:
            del self.sessions[self.random.choice(parked).number]  # aborted, or its lease is over
        elif self.snapshots:
            self.snapshots.pop(self.random.randrange(len(self.snapshots)))

    def attach(self, session: Session) -> Session:
        """Open or resume: it begins from the beginning."""
        self.attached += 1
        self.epoch += 1
        session.epoch = self.epoch
        session.active, session.sending, session.pending = True, None, []
        session.root = self.random.choice(ROOTS)
        session.todo = [n for n in NAMES if n in below([session.root]) and n != session.root] + [session.root]
        return session

    def backup_step(self, session: Session) -> None:
        if session.sending is not None:
            self.send(session, *session.sending)
        elif session.todo:
            node = session.todo.pop(0)
            if self.is_missing(session, node):
                chunks = [c for c in NAMES[node] if c in CHUNKS and self.is_missing(session, c)]
                session.sending = node, chunks
        else:
            self.flush(session)
            self.require(session, [session.root])
            self.snapshots.append(session.root)
            del self.sessions[session.number]

    def send(self, session: Session, node: str, chunks: list[str]) -> None:
        if chunks:
            session.pending.append(chunks.pop())
            return
        self.require(session, NAMES[node])
        session.pending.append(node)
        session.sending = None

    def stop(self, session: Session, *, drop: bool) -> None:
        """Park or abort; what was not flushed is lost."""
        if self.random.random() < 0.7:
            self.flush(session)
        session.active = False
        if drop:
            del self.sessions[session.number]

    def flush(self, session: Session) -> None:
        for blob in session.pending:
            if blob not in self.blobs or self.blobs[blob].dying:
                self.blobs[blob] = Entry(session.number)
        session.pending = []

    def is_missing(self, session: Session, blob: str) -> bool:
        if blob in session.pending:
            return False
        return blob not in self.blobs or (bool(self.blobs[blob].dying) and self.without != "asking")

    def require(self, session: Session, names: list[str]) -> None:
        if not all(self.may_name(session, name) for name in names):
            raise Refused

    def may_name(self, session: Session, blob: str) -> bool:
        entry = self.blobs.get(blob)
        return blob in session.pending or (
            entry is not None and (not entry.dying or entry.dying > session.epoch or self.without == "asking")
        )

    # --- gc

    def collect(self) -> Steps[None]:
        attached = self.attached
        sessions = {number: session.epoch for number, session in self.sessions.items()}
        yield
        if self.without == "order of looking":
            table = yield from self.read_table()
            active = yield from self.look(sessions)
        else:
            active = yield from self.look(sessions)
        snapshots = list(self.snapshots)
        yield
        if self.without != "order of looking":
            table = yield from self.read_table()
        needed = self.needed(table, snapshots, set(sessions))
        garbage = [b for b, entry in table.items() if entry.dying and b not in needed]
        doomed = [b for b, entry in table.items() if not entry.dying and b not in needed]
        oldest = min(active, default=NO_EPOCH)
        sure = [b for b in garbage if table[b].dying < oldest or self.without == "(b)"]
        if self.without != "(c)":
            staying = table.keys() - needed - set(sure)
            held = below(blob for blob in staying if blob in NAMES)
            sure = [b for b in sure if b not in held]
        yield from self.mark(table, needed, doomed)
        quiet = not active and (self.attached == attached or self.without == "quiet")
        yield
        yield from self.remove([*garbage, *doomed] if quiet else sure)

    def look(self, sessions: dict[int, int]) -> Steps[list[int]]:
        """The epochs of those that are active."""
        epochs: list[int] = []
        for number, epoch in sessions.items():
            if number in self.sessions and self.sessions[number].active:
                epochs.append(epoch)
            yield
        return epochs

    def read_table(self) -> Steps[dict[str, Entry]]:
        """Piece by piece: later pieces are younger."""
        table: dict[str, Entry] = {}
        for blob in self.key_order:
            if blob in self.blobs:
                table[blob] = Entry(self.blobs[blob].owner, self.blobs[blob].dying)
            yield
        return table

    def needed(self, table: dict[str, Entry], snapshots: list[str], kept: set[int]) -> set[str]:
        if self.without == "owning":
            kept = set()
        own = {blob for blob, entry in table.items() if entry.owner in kept}
        return below([*snapshots, *(blob for blob in own if blob in NAMES)]) | own

    def mark(self, table: dict[str, Entry], needed: set[str], doomed: list[str]) -> Steps[None]:
        for blob in [b for b, entry in table.items() if entry.dying and b in needed]:
            if blob in self.blobs:
                self.blobs[blob].dying = 0
            yield
        size = self.random.choice((1, 2, len(self.key_order)))
        for start in range(0, len(doomed), size):
            self.epoch += 1
            for blob in doomed[start : start + size]:
                if blob in self.blobs and not self.blobs[blob].dying:
                    self.blobs[blob].dying = self.epoch
            yield

    def remove(self, blobs: list[str]) -> Steps[None]:
        for blob in blobs:
            if blob in self.blobs and (self.blobs[blob].dying or self.without == "looking again"):
                del self.blobs[blob]
            yield


def fails(world: World) -> bool:
    """Is data lost, or a backup refused?"""
    try:
        return bool(world.run(400))
    except Refused:
        return True


def test_the_rules_suffice() -> None:
    for number in range(1000):
        assert not World(f"all rules {number}").run(400), number


@pytest.mark.parametrize("rule", ["asking", "order of looking", "(b)", "(c)", "quiet", "looking again"])
def test_no_rule_is_superfluous(rule: str) -> None:
    assert any(fails(World(f"{rule} {number}", rule)) for number in range(5000))


def test_owning_is_for_resuming_only() -> None:
    """Without it what a parked session stored is lost to it, but nothing to anybody else."""
    for number in range(100):
        assert not World(f"owning {number}", "owning").run(400), number
