"""The routes of one repository on a server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import urllib3
from blake3 import blake3

from casbackup.errors import CasbackupError, KeyMissing, ManifestDamaged, ServerProtocolError, SnapshotNotFound
from casbackup.ids import Namespace, SnapshotId, VmName
from casbackup.peer.http.snapshots import parse_adopted, parse_snapshot, parse_snapshots
from casbackup.peer.http.transport import Transport
from casbackup.repository.catalog import Snapshot
from casbackup.spec.config import RepositoryConfig, decode_config
from casbackup.spec.wire import VERSION, SnapshotFrame, decode_snapshots

_JSON = "application/json"


class RemoteRepository:
    """Requests below ``/v1/repositories/NAME``."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.transport = transport
        self.path = f"/{VERSION}/repositories/{name}"
        self.origin = f"{transport.name}/{name}"

    def config(self) -> RepositoryConfig:
        """:raise UnsupportedFormat: when this casbackup is too old for the repository."""
        return decode_config(self.request("GET", "/config"), f"config.json of {self.origin}")

    def stored_key(self) -> bytes | None:
        """None if the repository has no copy of its key."""
        try:
            return self.request("GET", "/key")
        except KeyMissing:
            return None

    def store_key(self, data: bytes, *, replace: bool) -> None:
        self.request("PUT", "/key", data, query={"replace": "true" if replace else "false"})

    def survey(
        self, namespace: Namespace | None = None, vm: VmName | None = None
    ) -> tuple[list[Snapshot], list[ManifestDamaged]]:
        query = {"namespace": namespace, "vm": vm}
        given = {key: value for key, value in query.items() if value is not None}
        return parse_snapshots(self.request("GET", "/manifests", query=given), self.origin)

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        query = {"reference": reference, "namespace": namespace}
        return self.snapshot(self.request("GET", "/manifests/find", query=query))

    def manifest(self, snapshot: SnapshotId) -> bytes:
        """The bytes of its file.

        :raise SnapshotNotFound: when it was forgotten.
        """
        for frame in decode_snapshots(self.request("GET", "/manifests/find", query={"reference": snapshot})):
            if isinstance(frame, SnapshotFrame) and blake3(frame.manifest).hexdigest() == snapshot:
                return frame.manifest
        raise SnapshotNotFound(f"{self.origin} has no manifest of the id {snapshot[:16]}")

    def snapshot(self, body: bytes) -> Snapshot:
        return parse_snapshot(body, self.origin)

    def adopted(self, body: bytes, count: int) -> list[Snapshot | CasbackupError]:
        """As ``parse_adopted``."""
        return parse_adopted(body, count, self.origin)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        is_last_word: bool = False,
    ) -> bytes:
        return self.transport.request(
            method, self.path + path, body, headers=headers, query=query, is_last_word=is_last_word
        )

    def ask(self, path: str, content: object) -> dict[str, Any]:
        """POST JSON, get a JSON object.

        :raise ServerProtocolError: when the answer is none.
        """
        return _object(self.ask_binary(path, content))

    def ask_binary(self, path: str, content: object) -> bytes:
        body = json.dumps(content).encode()
        return self.transport.request("POST", self.path + path, body, content_type=_JSON)

    def stream(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> contextlib.AbstractContextManager[urllib3.BaseHTTPResponse]:
        return self.transport.stream(method, self.path + path, body, headers=headers)


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body or b"{}")
    except ValueError as error:
        raise ServerProtocolError("the server sent something that is no JSON") from error
    if not isinstance(content, dict):
        raise ServerProtocolError("the server sent something that is no JSON object")
    return content
