"""The sink: a process of its own between QEMU and the backup, small so that little can go wrong in it.

It acknowledges QEMU's writes once they are in memory, which the backup has in view. Whatever happens to the backup, it
goes on acknowledging. When the backup dies without a word, it ends the jobs in QEMU in its place, thaws the guest, and
goes when QEMU has let go of it.

Run as ``python -P -m casbackup.qemu.sink_process DATA CONTROL LISTENER MEMORY OVERFLOW STATE``, with the numbers of
inherited descriptors. OVERFLOW is a file, and by STATE the memory of the VM comes; -1: not wanted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from mmap import mmap
from typing import Any

from casbackup.block.backlog import Backlog
from casbackup.block.buffers import BufferPool
from casbackup.block.rawfile import RawFile
from casbackup.errors import BackupBroken, CasbackupError
from casbackup.qemu.agent import GuestAgent
from casbackup.qemu.cleanup import remove_backup
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.sink_link import Link, Messages, Sender
from casbackup.qemu.sink_server import SinkExport, SinkServer
from casbackup.qemu.state_stream import StateReceiver
from casbackup.qemu.vmstate import Undo, undo, wake

REPORT_S = 0.05
"""How often the sink tells how it is."""
_RETRY_S = 0.5
_PATIENCE_S = 600.0
"""How long an orphaned sink waits for a monitor that somebody else has, while QEMU is connected to it."""
_THAW_PATIENCE_S = 120.0
"""How long it tries to thaw the guest: an agent that is busy freezing answers nothing before it is done."""


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """What the sink is told at its start: how to serve, and how to clean up without the backup."""

    exports: list[SinkExport]
    max_guest_stall_s: float
    qmp_path: str
    backup_name: str
    bitmap_token: str | None

    def message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, message: dict[str, Any]) -> SinkSettings:
        return cls(**{**message, "exports": [SinkExport(*item) for item in message["exports"]]})


class Sink:
    """The process, from the settings to the end."""

    def __init__(self, link: Link, listener: socket.socket, backlog: Backlog, state: socket.socket | None) -> None:
        self._messages = Messages(link.control)
        self._link = link
        self._listener = listener
        self._backlog = backlog
        self._sender = Sender(link.data, backlog)
        self._state_stream = state
        self._state: StateReceiver | None = None
        self._frozen_agent: str | None = None
        self._undo: Undo | None = None
        self._ending = False

    def run(self) -> None:
        settings = self._settings()
        if settings is None:
            return
        self._sender.start()
        self._server = SinkServer(self._backlog, settings.exports, max_guest_stall_s=settings.max_guest_stall_s)
        self._server.serve(self._listener)
        if self._state_stream is not None:
            self._state = StateReceiver(
                self._backlog,
                str(len(settings.exports)),
                self._state_stream,
                max_guest_stall_s=settings.max_guest_stall_s,
            )
        while not self._ending:
            if self._listen() is None or not self._report():
                while self._listen():  # what it still said before it died counts
                    pass
                self._orphaned(settings)
                return

    def _listen(self) -> list[dict[str, Any]] | None:
        """Obey what comes within a moment, and return it; None when nobody is there any more."""
        messages = self._messages.receive(REPORT_S)
        for message in messages or ():
            self._obey(message)
        return messages

    def _settings(self) -> SinkSettings | None:
        while (messages := self._messages.receive(60.0)) is not None:
            if messages:
                return SinkSettings.of(messages[0])
        return None

    def _report(self) -> bool:
        failure = self._backlog.failure
        return self._messages.send(
            {
                "waiting_bytes": self._backlog.waiting_bytes,
                "overflown_bytes": self._backlog.overflown_bytes,
                "failure": None if failure is None else failure.message,
            }
        )

    def _obey(self, message: dict[str, Any]) -> None:
        if "frozen" in message:
            self._frozen_agent = message["frozen"]
        elif "undo" in message:
            self._undo = None if message["undo"] is None else Undo(**message["undo"])
        elif "drop" in message:
            self._backlog.fail(BackupBroken(message["drop"]))
            self._hang_up()
        elif "finish" in message:
            threading.Thread(target=self._finish, name="sink-finish", daemon=True).start()
        elif "end" in message:
            self._ending = True

    def _finish(self) -> None:
        """In a thread, for reports go on: QEMU has written everything; when the backup has it all, say so."""
        if self._state is not None:
            self._state.finish()
        with contextlib.suppress(CasbackupError):  # the next report says it
            self._backlog.finish()
            self._sender.end()
        self._hang_up()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._link.data.shutdown(socket.SHUT_RDWR if self._backlog.failure else socket.SHUT_WR)

    def _orphaned(self, settings: SinkSettings) -> None:
        thawing = threading.Thread(target=self._thaw, name="sink-thaw")
        thawing.start()
        try:
            self._clean_up(settings)
        finally:
            thawing.join()
            if self._state is not None:
                self._state.wait()
            shutil.rmtree(os.path.dirname(self._listener.getsockname()), ignore_errors=True)

    def _clean_up(self, settings: SinkSettings) -> None:
        self._backlog.fail(BackupBroken("the backup's process has died"))
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            try:
                with QmpClient.connect(settings.qmp_path, timeout_s=_RETRY_S) as qmp:
                    if self._undo is not None:
                        wake(qmp, self._undo)
                    remove_backup(qmp, settings.backup_name, bitmap_token=settings.bitmap_token)
                    if self._undo is not None:
                        undo(qmp, self._undo)
                return
            except CasbackupError:
                if not self._server.connections and self._undo is None:
                    return
                time.sleep(_RETRY_S)

    def _thaw(self) -> None:
        """If the guest is frozen, or about to be."""
        deadline = time.monotonic() + _THAW_PATIENCE_S
        while self._frozen_agent is not None and time.monotonic() < deadline:
            try:
                with GuestAgent(self._frozen_agent) as agent:
                    agent.thaw()
                return
            except CasbackupError:
                time.sleep(_RETRY_S)


def _ignore_signals() -> None:
    """Those that end the backup: it then tells the sink when it may go."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _survive_others() -> None:
    """When memory runs out, the backup itself is to be ended first. Without the privilege nothing changes."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-500")


def main() -> None:
    _ignore_signals()
    _survive_others()
    data, control, listener, memory, overflow, state = map(int, sys.argv[1:])
    link = Link(socket.socket(fileno=data), socket.socket(fileno=control))
    file = None if overflow < 0 else RawFile(overflow, "the spool file", writable=True)
    backlog = Backlog(BufferPool(mmap(memory, 0)), file)
    try:
        Sink(link, socket.socket(fileno=listener), backlog, None if state < 0 else socket.socket(fileno=state)).run()
    finally:
        sys.stderr.flush()
        os._exit(0)  # threads that wait for QEMU or for a backup that is stuck do not matter any more


if __name__ == "__main__":
    main()
