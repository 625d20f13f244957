"""The peer over HTTP: what every peer does, and what only a network makes necessary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.peer.api import Peer
from casbackup.testing.peer import PeerConformance
from casbackup_server.rights import Right

from .conftest import grant, serving, token_gate

CHECKS = [name for name, _ in PeerConformance(None).checks()]  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: str, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def opened() -> Iterator[Peer]:
        with serving(tmp_path / "repository") as server, server.peer() as peer:
            yield peer

    dict(PeerConformance(opened).checks())[check]()


@pytest.mark.parametrize("check", CHECKS)
def test_conformance_with_all_rights(check: str, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def opened() -> Iterator[Peer]:
        with serving(tmp_path / "repository", token_gate) as server:
            token = grant(server.folder, Right.BACKUP, Right.RESTORE, Right.PRUNE)
            with server.peer(token) as peer:
                yield peer

    dict(PeerConformance(opened).checks())[check]()
