"""The QMP client against monitors that behave and that do not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.errors import QmpCommandFailed, QmpError, QmpLost, QmpProtocolError, QmpTimeout, QmpUnreachable
from casbackup.qemu.qmp import QmpClient

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}\r\n'
)

Answer = Callable[[dict[str, object]], bytes | None]


class Monitor:
    """Greets, then answers each command with what ``answer`` makes of it; None closes the connection."""

    def __init__(self, path: Path, answer: Answer, greeting: bytes = GREETING) -> None:
        self.path = str(path)
        self._answer = answer
        self._greeting = greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        stream, _ = self._listener.accept()
        with stream, stream.makefile("rwb") as file:
            file.write(self._greeting)
            file.flush()
            for line in file:
                request = json.loads(line)
                answer = b"{}" if request["execute"] == "qmp_capabilities" else self._answer(request)
                if answer is None:
                    return
                if answer == b"{}":
                    answer = json.dumps({"return": {}, "id": request["id"]}).encode()
                file.write(answer + b"\n")
                file.flush()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Callable[..., str]]:
    made: list[Monitor] = []

    def make(answer: Answer = lambda _: b"{}", **settings: bytes) -> str:
        made.append(Monitor(tmp_path / "q", answer, **settings))
        return made[-1].path

    yield make
    for one in made:
        one.close()


def test_commands_and_events(monitor: Callable[..., str]) -> None:
    def answer(request: dict[str, object]) -> bytes:
        event = b'{"event": "STOP", "data": {"a": 1}, "timestamp": {}}\n'
        return event + json.dumps({"return": request.get("arguments"), "id": request["id"]}).encode()

    with QmpClient.connect(monitor(answer)) as qmp:
        assert qmp.version == (10, 0, 2)
        assert qmp.execute("echo", {"x": [1]}) == {"x": [1]}
        event = qmp.wait_event(1)
        assert event is not None
        assert (event.name, event.data) == ("STOP", {"a": 1})
        assert qmp.wait_event(0.01) is None


def test_several_threads_get_their_own_answers(monitor: Callable[..., str]) -> None:
    def answer(request: dict[str, object]) -> bytes:
        return json.dumps({"return": request["arguments"], "id": request["id"]}).encode()

    wrong: list[object] = []
    with QmpClient.connect(monitor(answer)) as qmp:

        def ask(number: int) -> None:
            wrong.extend(n for n in range(50) if qmp.execute("echo", {"n": [number, n]}) != {"n": [number, n]})

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            lambda r: json.dumps({"error": {"class": "GenericError", "desc": "no"}, "id": r["id"]}).encode(),
            QmpCommandFailed,
        ),
        (lambda r: b'{"return": {}, "id": 99999}', QmpTimeout),
        (lambda r: None, QmpLost),
        (lambda r: b"what?", QmpProtocolError),
        (lambda r: b"[1]", QmpProtocolError),
        (lambda r: b"[" * 100_000, QmpProtocolError),
    ],
)
def test_failures(monitor: Callable[..., str], answer: Answer, error: type[QmpError]) -> None:
    with QmpClient.connect(monitor(answer)) as qmp, pytest.raises(error):
        qmp.execute("anything", timeout_s=0.3)


@pytest.mark.parametrize(
    ("greeting", "error"),
    [(b"QEMU 7.2 monitor\n", QmpProtocolError), (b"{}\n", QmpProtocolError), (b"", QmpUnreachable)],
)
def test_what_does_not_greet_is_no_monitor(monitor: Callable[..., str], greeting: bytes, error: type[QmpError]) -> None:
    with pytest.raises(error):
        QmpClient.connect(monitor(greeting=greeting), timeout_s=0.3)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(QmpUnreachable):
        QmpClient.connect(str(tmp_path / "nothing"))
    with pytest.raises(QmpUnreachable):
        QmpClient.connect("/" + "x" * 200)
