"""Putting a filter between the devices of a running VM and its disks, and taking it out again.

    device -> disk                        as QEMU was started
    device -> TOP -> disk                 a node that changes nothing, put in device by device
    device -> TOP -> FILTER -> disk       all disks in one step: the point in time
                       |  ^
                       |  +-- VIEW        the disk as it was at that point
                       +----> TARGET      the sink: gets what the guest is about to overwrite

TOP is there because QEMU re-points several nodes at once, but only one device at a time; and reopening a node sets all
its options, which are known of our own nodes only. All names begin with that of the backup, and what is below them
stands in QEMU's graph, so whoever knows that name can undo it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from casbackup.block.filters.clusters import CLUSTER_BYTES
from casbackup.errors import QmpCommandFailed
from casbackup.qemu import reading
from casbackup.qemu.disks import LiveDisk
from casbackup.qemu.features import Features
from casbackup.qemu.qmp import QmpClient

_TIMEOUT_S = 60.0
"""What changes the graph drains the guest's requests: a storage that hangs must not be given up at once."""
_SHORT_TIMEOUT_S = 4
"""Before QEMU 9.1 the filter counts nanoseconds in 32 bits, and takes 5 s for 0.7 s."""
_LONG_TIMEOUT_VERSION = 9, 1, 0

_TOP, _FILTER, _VIEW = "raw", "copy-before-write", "snapshot-access"
"""The drivers of our nodes."""


class Spliced(NamedTuple):
    """A disk with nodes of ours. ``name``: of its target, and what the names of the others begin with."""

    name: str
    disk: LiveDisk

    @property
    def top(self) -> str:
        return f"{self.name}-top"

    @property
    def filter(self) -> str:
        return f"{self.name}-filter"

    @property
    def view(self) -> str:
        return f"{self.name}-view"


def splice(qmp: QmpClient, spliced: Spliced, *, max_guest_stall_s: float, features: Features) -> None:
    """Put TOP in, and prepare FILTER on top of TARGET, which is there. Nothing changes for the guest.

    Should the target fail or not answer in time, the filter lets the guest's write pass, and the view is lost.

    :raise QmpCommandFailed: when QEMU cannot do that with this disk.
    """
    disk = spliced.disk
    _add(qmp, _top(spliced.top, disk.node))
    _point(qmp, disk.device, spliced.top)
    options: dict[str, Any] = {
        "driver": _FILTER,
        "node-name": spliced.filter,
        "file": disk.node,
        "target": spliced.name,
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": _filter_timeout_s(qmp, max_guest_stall_s),
    }
    if features.min_cluster_size:
        options["min-cluster-size"] = CLUSTER_BYTES
    _add(qmp, options)


def flush(qmp: QmpClient, disks: Sequence[Spliced]) -> None:
    """Before ``divert``: it flushes while the guest has to wait, which may take seconds when the host caches writes."""
    reading.flush(qmp, [item.top for item in disks])


def divert(qmp: QmpClient, disks: Sequence[Spliced]) -> None:
    """From now on all writes of the guest go through the filters: the point in time. Errors as ``splice``."""
    _reopen(qmp, [_top(item.top, item.filter) for item in disks])


def add_view(qmp: QmpClient, spliced: Spliced) -> None:
    """The disk as it was at the point in time. What is discarded there, the filter saves no more.

    Errors as ``splice``.
    """
    _add(qmp, {"driver": _VIEW, "node-name": spliced.view, "file": spliced.filter, "discard": "unmap"})


def restore(qmp: QmpClient, name: str) -> None:
    """Take out all nodes whose names begin with ``name``, but for the targets; harmless if there are none.

    Their exports must be gone. Errors as ``splice``.
    """
    ours = _nodes(qmp, name)
    if not ours:
        return
    _delete(qmp, ours, _VIEW)
    below = _below(qmp, name)
    reading.flush(qmp, _of(ours, _TOP))
    _reopen(qmp, [_top(top, below[top]) for top in _of(ours, _TOP)])
    _delete(qmp, ours, _FILTER)
    for device, top in _devices_on(qmp, _of(ours, _TOP)):
        _point(qmp, device, below[top])
    _delete(qmp, ours, _TOP)


def _filter_timeout_s(qmp: QmpClient, max_guest_stall_s: float) -> int:
    """Whole seconds, at least one, for 0 is for ever."""
    seconds = math.ceil(max_guest_stall_s)
    return seconds if qmp.version >= _LONG_TIMEOUT_VERSION else min(seconds, _SHORT_TIMEOUT_S)


def _top(name: str, below: str) -> dict[str, Any]:
    return {"driver": _TOP, "node-name": name, "file": below, "discard": "unmap"}


def _add(qmp: QmpClient, options: dict[str, Any]) -> None:
    qmp.execute("blockdev-add", options, timeout_s=_TIMEOUT_S)


def _point(qmp: QmpClient, device: str, node: str) -> None:
    qmp.execute("qom-set", {"path": device, "property": "drive", "value": node}, timeout_s=_TIMEOUT_S)


def _reopen(qmp: QmpClient, options: Sequence[dict[str, Any]]) -> None:
    if options:
        qmp.execute("blockdev-reopen", {"options": options}, timeout_s=_TIMEOUT_S)


def _nodes(qmp: QmpClient, name: str) -> dict[str, str]:
    """Our nodes but for the targets, and their drivers."""
    nodes = {str(node.get("node-name", "")): node["drv"] for node in qmp.execute("query-named-block-nodes")}
    return {
        node: driver for node, driver in nodes.items() if node.startswith(name) and driver in {_TOP, _FILTER, _VIEW}
    }


def _of(nodes: dict[str, str], driver: str) -> list[str]:
    return [node for node, its in nodes.items() if its == driver]


def _delete(qmp: QmpClient, nodes: dict[str, str], driver: str) -> None:
    for node in _of(nodes, driver):
        qmp.execute("blockdev-del", {"node-name": node}, timeout_s=_TIMEOUT_S)


def _below(qmp: QmpClient, name: str) -> dict[str, str]:
    """For each of our nodes the first one below it that is not ours."""
    graph = qmp.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    files = {names[edge["parent"]]: names[edge["child"]] for edge in graph["edges"] if edge["name"] == "file"}
    return {node: _first_other(files, node, name) for node in files if node.startswith(name)}


def _first_other(files: dict[str, str], node: str, name: str) -> str:
    while node.startswith(name):
        node = files[node]
    return node


def _devices_on(qmp: QmpClient, tops: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(device, node) of the devices that stand on one of these nodes."""
    wanted = set(tops)
    for entry in qmp.execute("query-block"):
        node = entry.get("inserted", {}).get("node-name", "")
        if node in wanted and "qdev" in entry:
            yield entry["qdev"], node


def can_point(qmp: QmpClient, disk: LiveDisk) -> bool:
    """Whether the disk belongs to a device that can be made to use another node."""
    if not disk.device:
        return False
    try:
        qmp.execute("qom-get", {"path": disk.device, "property": "drive"})
    except QmpCommandFailed:
        return False
    return True
