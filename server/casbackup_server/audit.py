"""What was done by whom: a line for everything that changes something, and for everything that was refused.

The lines are in the log (``"audit": true``), and if a file is set, there too: one JSON object each, appended.
"""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import TextIO

import structlog

from casbackup.errors import ConfigInvalid

_log = structlog.get_logger("casbackup.audit")


class Audit:
    """Safe from several threads."""

    def __init__(self, path: str | None = None) -> None:
        """:raise ConfigInvalid: when the file cannot be written."""
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:
            try:
                self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  open as long as the server
            except OSError as error:
                raise ConfigInvalid(f"the audit log {path} cannot be written: {error.strerror}") from error

    def note(self, event: str, **about: object) -> None:
        _log.info(event, audit=True, **about)
        if self._file is not None:
            line = json.dumps({"time": datetime.now(UTC).isoformat(), "event": event, **about}, default=str)
            with self._lock:
                self._file.write(line + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
