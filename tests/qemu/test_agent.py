"""The guest's agent: obeys, refuses, or hangs; the guest must never stay frozen."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.errors import GuestAgentError, GuestAgentFailed, GuestAgentUnavailable
from casbackup.qemu import agent as agent_module
from casbackup.qemu.agent import GuestAgent
from casbackup.qemu.freezing import frozen_guest
from casbackup.qemu.source import FreezePolicy


class FakeAgent:
    """Speaks as qemu-ga does, one client after the other. It may ``obey``, ``refuse``, ``hang`` or be ``stale``."""

    def __init__(self, path: Path, behaviour: str) -> None:
        self.path = str(path)
        self.behaviour = behaviour
        self.frozen = False
        self.commands: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(BrokenPipeError), stream, stream.makefile("rwb") as file:
                if self.behaviour == "stale":
                    file.write(b'{"return": 7}\n')
                    file.flush()
                for line in file:
                    answer = self._answer(json.loads(line.lstrip(b"\xff")))
                    if answer is not None:
                        file.write(answer)
                        file.flush()

    def _answer(self, request: dict[str, object]) -> bytes | None:
        command = str(request["execute"])
        self.commands.append(command)
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"  # type: ignore[index]
        if command == "guest-fsfreeze-freeze":
            self.frozen = True
            if self.behaviour == "hang":
                return None
            if self.behaviour == "refuse":
                return b'{"error": {"class": "GenericError", "desc": "a hook failed"}}\n'
            return b'{"return": 2}\n'
        self.frozen = False
        return b'{"return": 2}\n'


@pytest.fixture
def made(place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setattr(GuestAgent.freeze, "__kwdefaults__", {"timeout_s": 0.3})
    monkeypatch.setattr(GuestAgent.thaw, "__kwdefaults__", {"timeout_s": 0.5})
    fake = FakeAgent(place / "qga.sock", request.param)
    yield fake
    fake.close()


def freeze(fake: FakeAgent, policy: FreezePolicy) -> tuple[bool, list[str | None]]:
    announced: list[str | None] = []
    with frozen_guest(policy, fake.path, announced.append, print) as instant:
        assert not instant.frozen or fake.frozen
    return instant.frozen, announced


@pytest.mark.parametrize("made", ["obey", "stale"], indirect=True)
def test_a_frozen_guest_is_thawed(made: FakeAgent) -> None:
    assert freeze(made, FreezePolicy.REQUIRE) == (True, [made.path, None])
    assert not made.frozen


@pytest.mark.parametrize("made", ["hang", "refuse"], indirect=True)
def test_a_guest_that_cannot_be_frozen_is_thawed_all_the_same(made: FakeAgent) -> None:
    assert freeze(made, FreezePolicy.AUTO) == (False, [made.path, None])
    assert not made.frozen


@pytest.mark.parametrize(
    ("made", "error"), [("hang", GuestAgentUnavailable), ("refuse", GuestAgentFailed)], indirect=["made"]
)
def test_required_means_required(made: FakeAgent, error: type[GuestAgentError]) -> None:
    with pytest.raises(error):
        freeze(made, FreezePolicy.REQUIRE)
    assert not made.frozen


@pytest.mark.parametrize("made", ["obey"], indirect=True)
def test_an_error_meanwhile_thaws_the_guest(made: FakeAgent) -> None:
    with pytest.raises(ZeroDivisionError), frozen_guest(FreezePolicy.AUTO, made.path, lambda _: None, print):
        assert made.frozen
        raise ZeroDivisionError
    assert not made.frozen


@pytest.mark.parametrize("made", ["obey"], indirect=True)
def test_never_means_never(made: FakeAgent) -> None:
    assert freeze(made, FreezePolicy.NEVER) == (False, [])
    assert made.commands == []


def test_no_agent_is_a_crash_consistent_backup() -> None:
    with frozen_guest(FreezePolicy.AUTO, "/nonexistent", lambda _: None, print) as instant:
        assert not instant.frozen
    assert agent_module.SYNC_TIMEOUT_S < 10
