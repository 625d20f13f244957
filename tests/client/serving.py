"""What tests of commands that serve until they are told to end have in common."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any


def document_of(process: subprocess.Popen[bytes]) -> Any:
    """The document that it prints when it is ready, or the next one."""
    assert process.stdout is not None
    lines: list[bytes] = []
    while not lines or lines[-1] != b"}\n":
        line = process.stdout.readline()
        assert line, f"it ended: {process.stderr.read().decode() if process.stderr else ''}"
        lines.append(line)
    return json.loads(b"".join(lines))


def ended(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
    """End it by a signal: its status, and what else it printed to stdout and stderr."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()
