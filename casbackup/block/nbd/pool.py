"""A few connections to one export, lent to one call at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from casbackup.block.nbd.connection import Connection
from casbackup.errors import CasbackupError, NbdConnectionFailed, NbdProtocolError, NbdRequestFailed


class Pool:
    """Opens connections up to a limit as calls by several threads overlap; a limit of 1 makes it a lock.

    One broken connection ends the whole pool. To go on over a fresh one would be wrong: the server may have
    been restarted and have lost writes that it acknowledged.
    """

    def __init__(self, first: Connection, more: Callable[[], Connection], limit: int) -> None:
        """Takes over ``first``. ``more`` opens another connection to the same export."""
        self.info = first.info
        self._idle = [first]
        self._more = more
        self._opened = 1
        self._limit = limit
        self._broken: str | None = None
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection for the caller alone.

        :raise NbdConnectionFailed: when an earlier call broke the pool.
        """
        connection = self._take()
        try:
            yield connection
        except NbdRequestFailed:
            self._give_back(connection)
            raise
        except BaseException as error:  # also a signal in the middle of a reply
            self._break(connection, error)
            raise
        self._give_back(connection)

    def close(self) -> None:
        """Disconnect. No connection may be lent out."""
        with self._changed:
            self._broken = self._broken or "the device is closed"
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _take(self) -> Connection:
        with self._changed:
            while True:
                if self._broken is not None:
                    raise NbdConnectionFailed(self._broken)
                if self._idle:
                    return self._idle.pop()
                if self._opened < self._limit:
                    self._opened += 1
                    break
                self._changed.wait()
        return self._open_another() or self._take()

    def _open_another(self) -> Connection | None:
        """None when the server gives no further connection; the pool then stays as large as it is."""
        try:
            connection = self._more()
        except BaseException as error:
            with self._changed:
                self._opened -= 1
                self._limit = self._opened
                self._changed.notify()
            if isinstance(error, CasbackupError):
                return None
            raise
        if connection.info != self.info:
            contradiction = NbdProtocolError("the NBD server describes one export differently each time")
            self._break(connection, contradiction)
            raise contradiction
        return connection

    def _give_back(self, connection: Connection) -> None:
        with self._changed:
            if self._broken is None:
                self._idle.append(connection)
                self._changed.notify()
                return
        connection.close()

    def _break(self, connection: Connection, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        with self._changed:
            self._broken = self._broken or f"the connection was given up after: {reason}"
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for broken in (connection, *idle):
            broken.close()
