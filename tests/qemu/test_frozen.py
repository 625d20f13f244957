"""A guest whose file systems are frozen is thawed, even if the backup is killed at that moment."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.errors import CasbackupError
from tests.waiting import wait_until

from .conftest import BootGuest, assert_clean
from .test_agent import FakeAgent

pytestmark = pytest.mark.qemu

BACKUP = """
import sys
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.machine import Machine
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode

class Consumer:
    def write(self, disk, offset, data):
        pass
    def zero(self, disk, offset, length):
        pass

qmp = QmpClient.connect(sys.argv[1])
options = LiveOptions(freeze=FreezePolicy.REQUIRE, agent_path=sys.argv[2])
machine = Machine(qmp, Selection(), options, Mode.PUSH)
instant = machine.source(LiveControl(), print, None).run([DiskTask(disk, None) for disk in machine.disks], Consumer())
print(instant.frozen)
"""


class Agent(FakeAgent):
    """Does something the moment it is asked to freeze the guest, and takes its time then."""

    def __init__(self, path: Path, *, freezes_s: float) -> None:
        self.at_freeze: Callable[[], None] = lambda: None
        self._freezes_s = freezes_s
        super().__init__(path, "obey")

    def _answer(self, request: dict[str, object]) -> bytes | None:
        if request["execute"] == "guest-fsfreeze-freeze":
            self.at_freeze()
            time.sleep(self._freezes_s)
        return super()._answer(request)


class Frozen:
    """A backup as a process, and the agent that it freezes the guest with."""

    def __init__(self, guest: BootGuest, agent: Agent) -> None:
        self.agent = agent
        command = [sys.executable, "-c", BACKUP, guest.qmp_path, agent.path]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def start(guest: BootGuest, place: Path) -> Iterator[Callable[..., Frozen]]:
    made: list[Frozen] = []

    def begin(at_freeze: Callable[[subprocess.Popen[str]], None], *, freezes_s: float = 0.0) -> Frozen:
        agent = Agent(place / "qga.sock", freezes_s=freezes_s)
        agent.at_freeze = lambda: at_freeze(made[0].process)
        made.append(Frozen(guest, agent))
        return made[0]

    yield begin
    for frozen in made:
        frozen.process.kill()
        frozen.process.communicate()
        frozen.agent.close()


def is_clean(guest: BootGuest) -> bool:
    with contextlib.suppress(CasbackupError, AssertionError), guest.qmp() as qmp:
        assert_clean(qmp)
        return True
    return False


def assert_thawed_and_clean(guest: BootGuest, agent: Agent) -> None:
    wait_until(lambda: "guest-fsfreeze-thaw" in agent.commands and not agent.frozen)
    wait_until(lambda: is_clean(guest))
    guest.wait_written(guest.written() + 64)
    assert guest.errors == 0


def test_nothing_happens(guest: BootGuest, start: Callable[..., Frozen]) -> None:
    frozen = start(lambda _process: None)
    assert frozen.process.communicate(timeout=60)[0] == "True\n"
    assert frozen.agent.commands.count("guest-fsfreeze-freeze") == 1
    assert not frozen.agent.frozen


def test_killed_while_the_guest_freezes(guest: BootGuest, start: Callable[..., Frozen]) -> None:
    """The agent answers nothing for longer than the sink waits for an answer: it has to try again."""
    frozen = start(subprocess.Popen.kill, freezes_s=5.0)
    frozen.process.wait(60)
    assert_thawed_and_clean(guest, frozen.agent)


@pytest.mark.parametrize("command", ["transaction", "blockdev-backup"])
def test_killed_while_the_guest_is_frozen(guest: BootGuest, place: Path, command: str) -> None:
    """Between the agent's answer and the thaw: stopped there, for QEMU would be quicker."""
    agent = Agent(place / "qga.sock", freezes_s=0.0)
    kills = f"""
import casbackup.qemu.qmp as qmp_module, os, signal
execute = qmp_module.QmpClient.execute
def killed(self, name, *arguments, **options):
    if name == "transaction":
        if {command!r} == "blockdev-backup":
            execute(self, name, *arguments, **options)  # the jobs are running
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(self, name, *arguments, **options)
qmp_module.QmpClient.execute = killed
"""
    process = subprocess.run([sys.executable, "-c", kills + BACKUP, guest.qmp_path, agent.path], check=False)
    assert process.returncode == -signal.SIGKILL
    assert_thawed_and_clean(guest, agent)
    agent.close()


def test_ended_by_a_signal_while_the_guest_freezes(guest: BootGuest, place: Path, tmp_path: Path) -> None:
    """The command itself: it thaws the guest and cleans up before it goes."""
    agent = Agent(place / "qga.sock", freezes_s=1.0)
    start = "import sys; from casbackup_client.main import main; sys.exit(main())"
    repository = str(tmp_path / "repository")
    subprocess.run([sys.executable, "-c", start, "init", "-q", "-r", repository], check=True)
    command = [sys.executable, "-c", start, "backup", "vm/100", "--qmp", guest.qmp_path, "-r", repository]
    process = subprocess.Popen([*command, "--guest-agent", agent.path, "--json"], stderr=subprocess.PIPE, text=True)
    agent.at_freeze = process.terminate
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(err[err.index("{") :])["error"]["code"] == "interrupted"
    assert not agent.frozen
    assert_thawed_and_clean(guest, agent)
    agent.close()
