"""An export as the body of an answer: the job writes into a pipe, which is read as fast as the client takes it."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable

from casbackup.errors import TargetClosed
from casbackup.formats.port import ArchiveWriter
from casbackup.formats.target import descriptor_target
from casbackup.fs import Buffer
from casbackup.jobs.export import ExportPlan, export
from casbackup.peer.api import Peer
from casbackup.units import KiB
from casbackup_server.threads import Threads

_PIECE_BYTES = 512 * KiB
_WINDOW_SEGMENTS = 2
"""Half of what a command takes: others want memory, too."""


class RunningExport:
    """The job in a thread of its own, and our end of the pipe. Call ``end`` when the client is served, or gone."""

    def __init__(
        self, peer: Peer, plan: ExportPlan, writer: ArchiveWriter, compression: str, ended: Callable[[], None]
    ) -> None:
        """``ended``: called in the thread when the job reads no more."""
        self._peer = peer
        self._plan = plan
        self._writer = writer
        self._compression = compression
        self._ended = ended
        self._failure: BaseException | None = None
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="export", daemon=True)
        self._thread.start()

    async def pieces(self, threads: Threads) -> AsyncIterator[Buffer]:
        """The archive. :raise CasbackupError: what the job failed with; what came before is of no use then."""
        while piece := await threads.run(lambda: os.read(self._reading, _PIECE_BYTES)):
            yield piece
            del piece
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """A job that still writes notices that nobody reads, and ends."""
        if self._reading >= 0:
            os.close(self._reading)
            self._reading = -1

    def _run(self) -> None:
        try:
            with descriptor_target(
                self._writing, "the client", compression=self._compression, zstd_threads=0
            ) as target:
                export(self._peer, self._plan, self._writer, target, window_segments=_WINDOW_SEGMENTS)
        except TargetClosed:
            pass
        except BaseException as error:  # noqa: BLE001  handed to who reads
            self._failure = error
        finally:
            os.close(self._writing)
            self._ended()
