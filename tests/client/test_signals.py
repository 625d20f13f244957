"""Being stopped: the session can be resumed, the exit status says so, and a reader that goes away is no
error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import START, Casbackup, MiB

Start = Callable[..., subprocess.Popen[bytes]]


def wait_for_session(repository: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not list((repository / "locks").glob("session-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_backup_can_be_resumed(cb: Casbackup, start: Start, number: signal.Signals) -> None:
    content = cb.disk(data_mib=8, size_mib=12).read_bytes()
    process = start("backup", "vm/100", "scsi0=-", "--json", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(content[: 9 * MiB])
    process.stdin.flush()
    wait_for_session(cb.repository, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    error = json.loads(err)["error"]
    assert (process.returncode, out, error["code"], error["exit_status"]) == (130, b"", "interrupted", 130)
    assert number.name in error["message"]
    (session,) = cb.json("sessions")["sessions"]
    assert (session["id"], session["active"], session["kind"]) == (error["session"], False, "backup")
    disk = cb.folder / "vm.raw"
    cb.ok("backup", "vm/100", f"scsi0={disk}", "--resume", session["id"])
    assert cb.json("sessions") == {"sessions": []}
    assert cb.ok("dump", "vm/100", "scsi0").out == content


def test_the_session_is_named_for_people_and_can_be_aborted(cb: Casbackup, start: Start) -> None:
    process = start("backup", "vm/100", "scsi0=-", stdin=subprocess.PIPE)
    wait_for_session(cb.repository, process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    session = cb.json("sessions")["sessions"][0]["id"]
    assert err.decode().startswith("casbackup: stopped by SIGINT\n")
    assert f"--resume {session}" in err.decode()
    assert "Traceback" not in err.decode()
    assert "interrupted" in cb.ok("sessions").text
    assert cb.json("sessions", "abort", session) == {"aborted": session}
    assert cb.ok("sessions").text == "no sessions\n"


def test_ignored_signals_stay_ignored(cb: Casbackup, start: Start) -> None:
    content = cb.disk().read_bytes()
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {START}"
    process = start("backup", "vm/100", "scsi0=-", stdin=subprocess.PIPE, code=code)
    wait_for_session(cb.repository, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(content, timeout=30)
    assert process.returncode == 0


def test_a_reader_that_goes_away(cb: Casbackup, start: Start) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk(data_mib=4)}")
    for arguments in (["dump", "vm/100", "scsi0"], ["show", "vm/100"]):
        reader, writer = os.pipe()
        os.close(reader)
        process = start(*arguments, stdout=writer)
        os.close(writer)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (141, b"")


def test_a_full_output_is_an_error(cb: Casbackup, start: Start) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    with open("/dev/full", "wb") as full:
        process = start("snapshots", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.decode().startswith("casbackup: No space left on device")


def test_a_bug_is_called_one(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("casbackup.repository.repository.Repository.open", broken)
    result = bare("snapshots")
    assert result.status == 1
    assert "internal error: ZeroDivisionError: oops" in result.err and "bug" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("CASBACKUP_DEBUG", "1")
    assert "Traceback" in bare("snapshots").err
