"""A typed client of a server's REST interface: what there is, disks as files, exports, jobs.

    with RestClient(parse_address("https://backup.example.com:8007/main"), Credentials(token)) as client:
        snapshot = client.snapshots(vm="vm/100", last=1)[0]
        client.read_into(snapshot, "scsi0", 0, buffer)

Whoever restores whole disks is better served by ``HttpPeer``, which moves compressed chunks and verifies them itself;
here the server does both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from casbackup.errors import ServerProtocolError, ServerUnreachable
from casbackup.peer.http.address import Address
from casbackup.peer.http.diffs import RestDiskDifference, read_diff
from casbackup.peer.http.patience import PATIENCE_S
from casbackup.peer.http.transport import ANONYMOUS, Credentials, Transport
from casbackup.spec.wire import VERSION
from casbackup.units import MiB

_JSON = "application/json"
_PIECE_BYTES = 1 * MiB

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RestDisk:
    """``root``: the hash of all content, in hex."""

    name: str
    size_bytes: int
    root: str
    role: str


@dataclass(frozen=True, slots=True)
class RestConfig:
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RestSnapshot:
    """``time`` is RFC 3339. ``sealed``: the server does not have the key, and can give neither disks nor configs."""

    id: str
    namespace: str
    vm: str
    time: str
    sequence: int
    parent: str | None
    host: str
    pinned: bool
    labels: tuple[str, ...]
    notes: str
    disks: tuple[RestDisk, ...]
    configs: tuple[RestConfig, ...]
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class RestVm:
    """``latest``: the id of the latest snapshot."""

    namespace: str
    name: str
    snapshots: int
    latest: str
    latest_time: str


@dataclass(frozen=True, slots=True)
class RestJob:
    """``state``: waiting, running, succeeded, failed, cancelled or interrupted. Times are RFC 3339."""

    id: str
    kind: str
    task: str
    by: str
    state: str
    created: str
    started: str | None
    ended: str | None
    phase: str
    done_bytes: int
    total_bytes: int | None
    result: str
    error: str | None

    @property
    def is_over(self) -> bool:
        return self.ended is not None


class RestClient:
    """Safe from several threads. Use as a context manager, or call ``close``.

    Every method raises what the server says, as the error that the same failure is here, and ``ServerUnreachable``
    when patience did not help.
    """

    def __init__(
        self, address: Address, credentials: Credentials = ANONYMOUS, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._transport = Transport(address, credentials, patience_s=patience_s)
        self._path = f"/{VERSION}/repositories/{address.repository}"

    def __enter__(self) -> RestClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    # --- what there is

    def namespaces(self) -> list[str]:
        """Those that have snapshots."""
        return [item["name"] for item in self._ask("GET", "/namespaces")["namespaces"]]

    def vms(self, namespace: str | None = None) -> list[RestVm]:
        """Those that have snapshots."""
        return [_made(RestVm, item) for item in self._ask("GET", "/vms", namespace=namespace)["vms"]]

    def snapshots(
        self, namespace: str | None = None, vm: str | None = None, *, last: int | None = None
    ) -> list[RestSnapshot]:
        """In order of namespace, VM and number. ``last``: only so many of each VM."""
        found: list[RestSnapshot] = []
        while True:
            page = self._ask("GET", "/snapshots", namespace=namespace, vm=vm, last=last, offset=len(found))
            found += [_snapshot(item) for item in page["snapshots"]]
            if not page["snapshots"] or len(found) >= page["total"]:
                return found

    def snapshot(self, snapshot_id: str) -> RestSnapshot:
        """``snapshot_id``: or its beginning."""
        return _snapshot(self._ask("GET", f"/snapshots/{quote(snapshot_id)}"))

    # --- content

    def read_into(self, snapshot: RestSnapshot, disk: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from ``offset`` on; the range must be within the disk. What was lost on the way is asked for
        again.

        :raise DataDamage: when something in the range is lost. :raise DiskSealed: when the server lacks the key.
        """
        if len(buffer):
            self._transport.patiently(lambda: self._read(snapshot, disk, offset, buffer))

    def config(self, snapshot: RestSnapshot, name: str) -> bytes:
        return self._transport.request("GET", f"{self._path}/snapshots/{snapshot.id}/configs/{quote(name)}")

    def export(
        self,
        snapshot: RestSnapshot,
        format_name: str = "vma",
        *,
        compression: str = "none",
        disks: Sequence[str] = (),
    ) -> Iterator[bytes]:
        """The archive, piece by piece.

        :raise ServerUnreachable: when the connection breaks, as it does when the server cannot complete the archive:
            what came is of no use then.
        """
        query = [("format", format_name), ("compress", compression), *(("disk", disk) for disk in disks)]
        with self._transport.stream("GET", f"{self._path}/snapshots/{snapshot.id}/export?{urlencode(query)}") as answer:
            while piece := answer.read(_PIECE_BYTES):
                yield piece

    def diff(self, old: RestSnapshot, new: RestSnapshot, *, disks: Sequence[str] = ()) -> list[RestDiskDifference]:
        """Where the disks of two snapshots may differ; ``disks``: only these.

        :raise DataDamage: when that cannot be told.
        """
        query = [("to", new.id), *(("disk", disk) for disk in disks)]
        path = f"{self._path}/snapshots/{old.id}/diff?{urlencode(query)}"
        return self._transport.patiently(lambda: read_diff(self._transport, path))

    # --- jobs

    def jobs(self, limit: int = 50) -> list[RestJob]:
        """The newest first."""
        return [_made(RestJob, item) for item in self._ask("GET", "/jobs", limit=limit)["jobs"]]

    def job(self, job_id: str) -> RestJob:
        return _made(RestJob, self._ask("GET", f"/jobs/{quote(job_id)}"))

    def start_job(self, task: str) -> RestJob:
        """Waits for its turn if another one runs. :raise RepositoryBusy: when the same task is under way."""
        return _made(RestJob, self._ask("POST", "/jobs", {"task": task}))

    def cancel_job(self, job_id: str) -> RestJob:
        return _made(RestJob, self._ask("POST", f"/jobs/{quote(job_id)}/cancel", {}))

    def job_log(self, job_id: str, after: int = 0) -> list[str]:
        """Its lines, but for the first ``after``."""
        lines: list[str] = self._ask("GET", f"/jobs/{quote(job_id)}/log", after=after)["lines"]
        return lines

    def _read(self, snapshot: RestSnapshot, disk: str, offset: int, buffer: memoryview) -> None:
        headers = {"Range": f"bytes={offset}-{offset + len(buffer) - 1}"}
        path = f"{self._path}/snapshots/{snapshot.id}/disks/{quote(disk)}"
        position = 0
        with self._transport.stream("GET", path, headers=headers) as answer:
            if answer.status != 206:
                raise ServerProtocolError("the server did not give the range that it was asked for")
            while position < len(buffer) and (piece := answer.read(min(_PIECE_BYTES, len(buffer) - position))):
                buffer[position : position + len(piece)] = piece
                position += len(piece)
        if position < len(buffer):
            raise ServerUnreachable("the server sent less than it was asked for")

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None, **query: object) -> dict[str, Any]:
        given = {name: str(value) for name, value in query.items() if value is not None}
        data = None if body is None else json.dumps(body).encode()
        answer = self._transport.request(method, self._path + path, data, content_type=_JSON, query=given)
        try:
            content = json.loads(answer)
        except ValueError as error:
            raise ServerProtocolError("the server's answer is not JSON") from error
        if not isinstance(content, dict):
            raise ServerProtocolError("the server's answer is not understood")
        return content


def _made(kind: type[T], content: Any) -> T:
    """Keys that a newer server adds are passed over, and what an older one does not know is as the default says.

    :raise ServerProtocolError: when another one is missing.
    """
    try:
        names = [field.name for field in fields(kind) if field.name in content]  # type: ignore[arg-type]
        return kind(**{name: content[name] for name in names})
    except (KeyError, TypeError) as error:
        raise ServerProtocolError(f"the server's answer is not understood: {error}") from error


def _snapshot(content: Any) -> RestSnapshot:
    snapshot = _made(RestSnapshot, content)
    return replace(
        snapshot,
        labels=tuple(snapshot.labels),
        disks=tuple(_made(RestDisk, item) for item in snapshot.disks),
        configs=tuple(_made(RestConfig, item) for item in snapshot.configs),
    )
