"""The backup's side of its sink: starts it, watches it, and takes its place should it die."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from mmap import ACCESS_READ, mmap
from types import TracebackType
from typing import Any, NamedTuple, Self

from casbackup.block.rawfile import RawFile
from casbackup.block.sparse import temporary_device
from casbackup.block.spool import Consumer
from casbackup.errors import BackupBroken, CasbackupError, SinkLost
from casbackup.qemu.sink_link import Messages, Receiver, new_link
from casbackup.qemu.sink_process import SinkSettings
from casbackup.qemu.sink_server import SharedListener, StandIn
from casbackup.qemu.state_stream import drained
from casbackup.qemu.vmstate import Undo

_MODULE = "casbackup.qemu.sink_process"
_LEAST_SILENCE_S = 1.0
"""A sink that is silent for less is only short of processor time."""
_START_S = 15.0
_END_S = 5.0
_POLL_S = 0.2
_STEP_S = 0.01
_RECONNECT_S = 3
"""QEMU tries at once, and again a second later. The stand-in answers within milliseconds, but on a busy machine."""


def reconnect_delay_s(max_guest_stall_s: float) -> int:
    """How long QEMU is to try to reach a sink that is gone, while writes wait."""
    return math.ceil(max_guest_stall_s) + _RECONNECT_S


class SinkSpace(NamedTuple):
    """What the sink may take. ``overflow_folder``: for a file without a name; None: where temporary files go."""

    memory_bytes: int
    overflow_bytes: int = 0
    overflow_folder: str | None = None

    def memory(self) -> int:
        """The descriptor of new memory that two processes can have in view."""
        descriptor = os.memfd_create("casbackup-sink", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, self.memory_bytes)
        return descriptor

    def overflow(self) -> RawFile | None:
        """A new file, if there is to be one. Errors as ``temporary_device``."""
        return temporary_device(self.overflow_bytes, self.overflow_folder) if self.overflow_bytes else None


class SinkHost:
    """Enter it to start the sink. ``failure`` says why the backup is broken, if it is."""

    def __init__(
        self, settings: SinkSettings, space: SinkSpace, *, uid: int, gid: int, saves_state: bool = False
    ) -> None:
        """``uid``, ``gid``: QEMU's. ``saves_state``: the sink takes a VM's memory, too, by ``state_stream``, as a disk
        after the others.

        Errors as ``SharedListener`` and ``SinkSpace.overflow``.
        """
        self._settings = settings
        self._overflow = space.overflow()
        self._memory = space.memory()
        self._silence_s = max(_LEAST_SILENCE_S, settings.max_guest_stall_s)
        self._listener = SharedListener(uid=uid, gid=gid)
        self._link, self._theirs = new_link()
        self._state_ends: Sequence[socket.socket] = socket.socketpair() if saves_state else ()
        self._messages = Messages(self._link.control)
        self._watcher = threading.Thread(target=self._watch, name="sink-watch", daemon=True)
        self._report: dict[str, Any] = {}
        self._started = threading.Event()
        self._ending = self._dropped = self._owes_undo = False
        self._lost: SinkLost | None = None
        self._stand_in: StandIn | None = None
        self._drain: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> str:
        """Of the socket that QEMU is to connect to."""
        return self._listener.path

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def failure(self) -> CasbackupError | None:
        reason = self._report.get("failure")
        return self._lost or (BackupBroken(reason) if reason else None)

    @property
    def is_lost(self) -> bool:
        """Whether the sink is dead, and its stand-in serves QEMU."""
        return self._lost is not None

    @property
    def waiting_bytes(self) -> int:
        """Data in the sink's memory that the backup has not taken yet."""
        return int(self._report.get("waiting_bytes", 0))

    @property
    def overflown_bytes(self) -> int:
        """The same in its file."""
        return int(self._report.get("overflown_bytes", 0))

    def receive_into(self, consumer: Consumer) -> bool:
        """Hand all data to ``consumer``, until there is no more. False when it is not all. Errors of the consumer."""
        receiver = Receiver(self._link.data, mmap(self._memory, 0, access=ACCESS_READ), self._overflow)
        complete = receiver.receive_all(consumer)
        if not complete and not self._dropped:  # then it has died, as the watcher will find out, too
            self._watcher.join(self._silence_s + _POLL_S)
        return complete

    def frozen(self, agent_path: str | None) -> None:
        """The guest is frozen through this agent; None: it is thawed. An orphaned sink thaws it."""
        self._messages.send({"frozen": agent_path})

    @contextlib.contextmanager
    def state_stream(self) -> Iterator[socket.socket]:
        """QEMU's end of the stream of memory. Once it is closed here, QEMU's copy is the only one. Enter it once."""
        with self._state_ends[1] as stream:
            yield stream

    def undo(self, what: Undo | None) -> None:
        """What an orphaned sink is to do to QEMU; None: nothing any more. If something is left at the end, the sink
        goes on trying: QEMU did not answer, and the guest may stand still.
        """
        self._owes_undo = what is not None
        self._messages.send({"undo": None if what is None else what.message()})

    def drop(self, reason: str) -> None:
        """Give the backup up: what comes is acknowledged and dropped. ``receive_into`` returns."""
        self._dropped = True
        self._messages.send({"drop": reason})

    def wait_replaced(self) -> None:
        """If the sink is gone, wait a moment until QEMU has come to its stand-in.

        A job must not be cancelled before: QEMU then fails those writes, the guest's too, that wait to be connected.
        """
        deadline = time.monotonic() + reconnect_delay_s(self._settings.max_guest_stall_s)
        while self._lost is not None and time.monotonic() < deadline:
            if self._stand_in is not None and self._stand_in.heard == len(self._settings.exports):
                return
            time.sleep(_STEP_S)

    def finish(self) -> None:
        """QEMU has written everything: ``receive_into`` returns True when it has handed over the rest."""
        self._messages.send({"finish": True})

    def __enter__(self) -> Self:
        self._process = self._launch()
        self._theirs.close()
        self._messages.send(self._settings.message())
        self._watcher.start()
        if not self._started.wait(_START_S) or self._lost is not None:
            self.__exit__(None, None, None)
            raise self._lost or SinkLost(f"the sink did not start within {_START_S:g} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the sink. QEMU must have let go of it."""
        self._ending = True
        if self._process is not None:
            self._end(self._process)
        for end in self._state_ends[1:]:
            end.close()
        if self._drain is not None:
            self._drain.join()
        self._watcher.join()
        self._link.close()
        for end in self._state_ends[:1]:
            end.close()
        self._listener.close()
        os.close(self._memory)
        if self._overflow is not None:
            self._overflow.close()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if self._owes_undo:  # without a word it takes itself for orphaned
            threading.Thread(target=process.wait, name="sink-end", daemon=True).start()
            return
        self._messages.send({"end": True})
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _launch(self) -> subprocess.Popen[bytes]:
        inherited = [
            self._theirs.data.fileno(),
            self._theirs.control.fileno(),
            self._listener.socket.fileno(),
            self._memory,
            -1 if self._overflow is None else self._overflow.fileno(),
            self._state_ends[0].fileno() if self._state_ends else -1,
        ]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, *map(str, inherited)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # whoever reads what the backup says must not wait for the sink
            pass_fds=[descriptor for descriptor in inherited if descriptor >= 0],
            start_new_session=True,
        )

    def _watch(self) -> None:
        """In a thread: take the sink's reports. The first that does not come ends the backup, not the guest."""
        heard_s = time.monotonic()
        while not self._ending:
            messages = self._messages.receive(_POLL_S)
            if messages is None:
                break
            if messages:
                heard_s = time.monotonic()
                self._report = messages[-1]
                self._started.set()
            elif self._started.is_set() and time.monotonic() - heard_s > self._silence_s:
                break
        if not self._ending:
            self._replace()

    def _replace(self) -> None:
        """The sink is dead or hangs: serve QEMU in its place. It connects anew by itself."""
        assert self._process is not None
        self._process.kill()
        status = self._process.wait()
        self._lost = SinkLost(f"the sink of the backup ended unexpectedly (status {status}); the guest goes on")
        self._stand_in = StandIn(self._settings.exports, self._lost)
        self._stand_in.serve(self._listener.socket)
        if self._state_ends:
            self._drain = drained(self._state_ends[0])
        self._started.set()
