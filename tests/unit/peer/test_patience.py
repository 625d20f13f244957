"""How long a server is waited for. The pauses are real, so they are short."""

from __future__ import annotations

import threading
import time

import pytest

from casbackup.errors import ServerBusy, ServerUnreachable, SnapshotNotFound
from casbackup.peer.http import patience as module
from casbackup.peer.http.patience import Patience


class Server:
    """Fails a number of times, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.asked = 0

    def __call__(self) -> str:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def down() -> ServerUnreachable:
    return ServerUnreachable("nobody is there")


def reached(longest_s: float) -> Patience:
    patience = Patience(longest_s)
    patience.answered()
    return patience


def test_what_passes_is_tried_again() -> None:
    server = Server(down(), ServerBusy("later"), down())
    assert reached(10).run(server) == "answer"
    assert server.asked == 4


def test_what_is_final_is_not() -> None:
    server = Server(SnapshotNotFound("none"))
    with pytest.raises(SnapshotNotFound):
        reached(10).run(server)
    certificate = down()
    certificate.__dict__["final"] = True
    with pytest.raises(ServerUnreachable):
        reached(10).run(Server(certificate))
    assert server.asked == 1


def test_one_that_never_answered_gets_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PATIENCE_S", 0.05)
    server = Server(*(down() for _ in range(100)))
    with pytest.raises(ServerUnreachable):
        Patience(60).run(server)
    assert server.asked == 1
    assert reached(60).run(Server(down())) == "answer"


def test_one_that_was_given_up_is_tried_once_and_not_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = reached(0.05)
    server = Server(*(down() for _ in range(100)))
    with pytest.raises(ServerUnreachable):
        patience.run(server)
    assert patience.is_lost
    asked = server.asked
    for _ in range(50):
        with pytest.raises(ServerUnreachable, match="nobody is there"):
            patience.run(server)
    assert server.asked == asked
    monkeypatch.setattr(module, "_QUIET_S", 0.0)
    with pytest.raises(ServerUnreachable):
        patience.run(server)
    assert server.asked == asked + 1
    server.failures.clear()
    assert patience.run(server) == "answer"
    patience.answered()
    assert not patience.is_lost
    server.failures = [down()]
    assert reached(10).run(server) == "answer"


def test_whoever_wants_to_leave_does_not_wait() -> None:
    patience = reached(60)
    failures = [down() for _ in range(1000)]
    threading.Timer(0.3, patience.end).start()
    began_s = time.monotonic()
    with pytest.raises(ServerUnreachable):
        patience.run(Server(*failures))
    assert 0.2 < time.monotonic() - began_s < 3
    server = Server(*failures)
    for _ in range(10):
        with pytest.raises(ServerUnreachable):
            patience.run(server)
    assert server.asked == 0


def test_a_last_word_is_said_once() -> None:
    patience = reached(60)
    server = Server(*(down() for _ in range(100)))
    for _ in range(10):
        with pytest.raises(ServerUnreachable):
            patience.run(server, only_once=True)
    assert server.asked == 1
    assert patience.run(Server(down())) == "answer", "others are as patient as before"


def test_a_busy_server_is_not_given_up() -> None:
    patience = reached(0.05)
    with pytest.raises(ServerBusy):
        patience.run(Server(*(ServerBusy("later") for _ in range(100))))
    assert not patience.is_lost
