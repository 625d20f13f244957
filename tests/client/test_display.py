"""What people see: plain tables, drawn ones, progress, sizes of things; and that it does nothing to their
terminal.
"""

from __future__ import annotations

import os
import pty
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup_client.localtime import LocalZone
from casbackup_client.progress import State, TerminalProgress, describe
from casbackup_client.readahead import ReadAhead
from casbackup_client.views import Fields, Table, counted, one_line, plain_lines, printable

from .conftest import Casbackup, MiB

Start = Callable[..., subprocess.Popen[bytes]]


def test_plain_views() -> None:
    table = Table(("name", ">size"), [("a", "1"), ("long name", "12345")])
    view = ["text", table, Fields([("key", "one\ntwo"), ("longer", "")])]
    assert list(plain_lines(view)) == [
        "text",
        "name        size",
        "a              1",
        "long name  12345",
        "key     one\n        two",
        "longer",
    ]


def test_text_cannot_command_a_terminal() -> None:
    assert printable("fine: ü €") == "fine: ü €"
    assert printable("\x1b[2J\r\x07") == "\\x1b[2J\\r\\x07"
    assert one_line("a\nb" + "c" * 100, 10) == "a bcccccc…"
    assert (counted(1, "pack"), counted(0, "pack")) == ("1 pack", "0 packs")


def test_progress_is_described() -> None:
    counters = {"done": 512 * MiB, "new": 10 * MiB, "reused": 500 * MiB, "zero": 2 * MiB}
    state = State("scsi0", 1024 * MiB, counters, 1.0, 256 * MiB)
    assert describe(state) == (
        "scsi0   50% 512 MiB of 1.00 GiB  256 MiB/s  0:02 left  new 10.0 MiB  reused 500 MiB  zero 2.00 MiB"
    )
    assert describe(State("scsi0", None, {"done": MiB}, 1.0, MiB)) == "scsi0  1.00 MiB  1.00 MiB/s"
    assert describe(State("marking", None, {"nodes": 7}, 2.0, 0)) == "marking  2.00 s  7 nodes"
    assert describe(State("", None, {}, 1.0, 0)) == ""
    assert "2:46:40 left" in describe(State("x", 10000, {"done": 0}, 1.0, 1))


def test_progress_counts_from_threads_and_phases() -> None:
    progress = TerminalProgress()
    progress.start("a", 100)
    progress.advance(done=10, new=5)
    progress.advance(done=20)
    state = progress.state()
    assert (state.title, state.total_bytes, state.counters) == ("a", 100, {"done": 30, "new": 5})
    assert state.rate > 0
    progress.start("b", None)
    assert progress.state().counters.get("done", 0) == 0
    progress.finish()
    assert progress.state().title == ""


def on_terminal(start: Start, *arguments: object, feed: bytes = b"") -> tuple[int, str]:
    """Run a command whose stdout and stderr are a terminal of 100 columns; gives its status and what is
    drawn.
    """
    ours, theirs = pty.openpty()
    process = start(
        *arguments,
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(theirs)
    assert process.stdin is not None
    if feed:
        process.stdin.write(feed)
        process.stdin.flush()
        time.sleep(1.5)
    process.stdin.close()
    shown = b""
    while True:
        try:
            got = os.read(ours, 65536)
        except OSError:
            break
        if not got:
            break
        shown += got
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_tables_are_drawn_on_a_terminal(cb: Casbackup, start: Start) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    status, shown = on_terminal(start, "snapshots")
    assert status == 0
    assert "vm/100@" in shown and "─" in shown and "\x1b[1m" in shown


def test_a_long_backup_shows_progress_and_a_summary(cb: Casbackup, start: Start) -> None:
    status, shown = on_terminal(start, "backup", "vm/100", "scsi0=-", feed=cb.disk(data_mib=5).read_bytes())
    assert status == 0
    assert "scsi0  " in shown and "/s" in shown and "\x1b[?25h" in shown  # the cursor is back
    assert "snapshot  vm/100@" in shown


def test_quiet_is_quiet_on_a_terminal_too(cb: Casbackup, start: Start) -> None:
    assert on_terminal(start, "backup", "vm/100", f"scsi0={cb.disk()}", "-q") == (0, "")


@pytest.mark.parametrize(
    ("zone", "stamp", "local"),
    [
        ("UTC", "2026-07-01T12:00:00+00:00", "2026-07-01 12"),
        ("Europe/Berlin", "2026-07-01T22:30:00+00:00", "2026-07-02 00"),
        ("Europe/Berlin", "2026-12-01T22:30:00+00:00", "2026-12-01 23"),
        ("XYZ-05:30", "2026-12-01T20:00:00+00:00", "2026-12-02 01"),
    ],
)
def test_local_time(monkeypatch: pytest.MonkeyPatch, zone: str, stamp: str, local: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        if zone == "Europe/Berlin" and time.tzname[0] == "Europe":
            pytest.skip("no database of time zones here")
        moment = datetime.fromisoformat(stamp)
        shown = datetime.fromtimestamp(moment.timestamp(), LocalZone())
        assert shown.strftime("%Y-%m-%d %H") == local
        assert shown.astimezone(UTC) == moment
    finally:
        monkeypatch.undo()
        time.tzset()


def test_read_ahead_gives_all_in_order_and_errors_in_their_place() -> None:
    content = os.urandom(20 * MiB)
    device = MemoryDevice(bytearray(content))
    with ReadAhead(device, 1000, len(content) - 3000, threads=3) as pieces:
        assert b"".join(pieces) == content[1000:-2000]
    with ReadAhead(device, 0, 0) as pieces:
        assert list(pieces) == []
    with ReadAhead(device, 0, len(content), threads=2) as pieces:
        assert bytes(next(iter(pieces))) == content[: 4 * MiB]  # leaving early ends the threads


def test_read_ahead_raises_where_the_bytes_would_have_come() -> None:
    class Broken(MemoryDevice):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == 8 * MiB:
                raise RuntimeError("broken")
            super().read_into(offset, buffer)

    taken = 0
    with (
        ReadAhead(Broken(bytearray(16 * MiB)), 0, 16 * MiB, threads=2) as pieces,
        pytest.raises(RuntimeError),
    ):
        for piece in pieces:
            taken += len(piece)
    assert taken == 8 * MiB
