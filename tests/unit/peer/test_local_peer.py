"""The in-process peer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casbackup.peer.api import Peer
from casbackup.peer.local import LocalPeer
from casbackup.repository.repository import Repository
from casbackup.testing.peer import PeerConformance

CHECKS = [name for name, _ in PeerConformance(None).checks()]  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: str, tmp_path: Path) -> None:
    @contextmanager
    def opened() -> Iterator[Peer]:
        with Repository.create(str(tmp_path / "repository")) as repository:
            yield LocalPeer(repository)

    dict(PeerConformance(opened).checks())[check]()
