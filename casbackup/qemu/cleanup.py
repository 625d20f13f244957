"""Taking out of QEMU what a backup put into it. Done by the backup, and in its place by its sink when it has died.

All jobs and nodes of one backup begin with its name, so nothing need be remembered: what bears the name goes.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from casbackup.errors import CasbackupError, QmpCommandFailed, QmpTimeout
from casbackup.qemu import graph, vmstate
from casbackup.qemu.names import PREFIX
from casbackup.qemu.qmp import QmpClient

_PATIENCE_S = 20.0
"""How long cancelled jobs may take before their targets are cut off."""
_POLL_S = 0.05
_PROBE_S = 1.0
_DONE = ("concluded", "null")


def remove_backup(qmp: QmpClient, name: str, *, bitmap_token: str | None = None) -> None:
    """Cancel the jobs whose ids begin with ``name``, remove its exports and nodes; harmless if there is nothing.

    ``bitmap_token``: remove the bitmaps with that token, too.

    :raise QmpTimeout: when a job does not end. Other errors as ``QmpClient.execute``.
    """
    cancel_jobs(qmp, name)
    dismiss_jobs(qmp, name)
    remove_exports(qmp, name)
    graph.restore(qmp, name)
    remove_nodes(qmp, name)
    if bitmap_token is not None:
        remove_bitmaps(qmp, bitmap_token)


def jobs_of(qmp: QmpClient, name: str) -> list[dict[str, Any]]:
    """What ``query-jobs`` tells of the jobs whose ids begin with ``name``."""
    return [job for job in qmp.execute("query-jobs") if str(job["id"]).startswith(name)]


def cancel_jobs(qmp: QmpClient, name: str, *, patience_s: float = _PATIENCE_S) -> None:
    """Cancel, and wait until all are concluded. Targets that hang are cut off when patience ends.

    :raise QmpTimeout: when even that did not help.
    """
    for job in _running(qmp, name):
        _cancel(qmp, job)
    if _wait_concluded(qmp, name, patience_s):
        return
    _cut_targets(qmp, name)
    if not _wait_concluded(qmp, name, patience_s):
        raise QmpTimeout(f"the backup jobs of QEMU did not end within {2 * patience_s:g} s")


def dismiss_jobs(qmp: QmpClient, name: str) -> None:
    """Remove concluded jobs from QEMU's list."""
    for job in jobs_of(qmp, name):
        with contextlib.suppress(QmpCommandFailed):  # gone in the meantime
            qmp.execute("job-dismiss", {"id": job["id"]})


def remove_exports(qmp: QmpClient, name: str) -> None:
    """Stop QEMU's NBD server if it has an export whose id begins with ``name``: then it was started for that."""
    if any(str(export["id"]).startswith(name) for export in qmp.execute("query-block-exports")):
        qmp.execute("nbd-server-stop")


def remove_nodes(qmp: QmpClient, name: str) -> None:
    """Close the targets. QEMU flushes each; what it wrote before has arrived when this returns."""
    for node in qmp.execute("query-named-block-nodes"):
        if str(node.get("node-name", "")).startswith(name):
            qmp.execute("blockdev-del", {"node-name": node["node-name"]})


def remove_bitmaps(qmp: QmpClient, token: str) -> None:
    """Remove all bitmaps with this token."""
    for node in qmp.execute("query-named-block-nodes"):
        names = [bitmap.get("name", "") for bitmap in node.get("dirty-bitmaps", ())]
        remove_named_bitmaps(qmp, node["node-name"], (name for name in names if name.endswith(f"-{token}")))


def remove_named_bitmaps(qmp: QmpClient, node: str, names: Iterable[str]) -> None:
    """Remove bitmaps of a node; one that is gone, or that somebody uses, is left to the next backup."""
    for name in names:
        with contextlib.suppress(QmpCommandFailed):
            qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": name})


def remove_leftovers(qmp: QmpClient) -> bool:
    """Remove what earlier backups left behind that could not clean up. False when one is running."""
    if _running(qmp, PREFIX) or _is_served(qmp):
        return False
    remove_backup(qmp, PREFIX)
    vmstate.forget(qmp)
    return True


def _running(qmp: QmpClient, name: str) -> list[dict[str, Any]]:
    return [job for job in jobs_of(qmp, name) if job["status"] not in _DONE]


def _is_served(qmp: QmpClient) -> bool:
    """Whether the sink of a backup is alive: in pull mode no job tells that one is running."""
    for node in qmp.execute("query-named-block-nodes"):
        if str(node.get("node-name", "")).startswith(PREFIX) and node["drv"] == "nbd":
            path = parse_qs(urlsplit(node["file"]).query).get("socket", [""])[0]
            with socket.socket(socket.AF_UNIX) as stream, contextlib.suppress(OSError):
                stream.settimeout(_PROBE_S)
                stream.connect(path)
                return True
    return False


def _cancel(qmp: QmpClient, job: dict[str, Any]) -> None:
    with contextlib.suppress(QmpCommandFailed):  # it has ended meanwhile, or is about to
        qmp.execute("job-cancel", {"id": job["id"]})


def _wait_concluded(qmp: QmpClient, name: str, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while _running(qmp, name):
        if time.monotonic() > deadline:
            return False
        qmp.wait_event(_POLL_S)
    return True


def _cut_targets(qmp: QmpClient, name: str) -> None:
    """The last resort against a target that hangs (``yank``): what waits for it fails at once."""
    for node in qmp.execute("query-named-block-nodes"):
        node_name = str(node.get("node-name", ""))
        if node_name.startswith(name):
            with contextlib.suppress(CasbackupError):  # QEMU does not have it, or no longer the node
                qmp.execute("yank", {"instances": [{"type": "block-node", "node-name": node_name}]})
