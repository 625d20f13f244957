"""One operation on a repository as a process of its own, whose time and peak memory are measured from start to end.

    python -m tests.benchmarks.measure OPERATION REPOSITORY [ARGUMENT]

``run`` is what a test calls. The child prints what the operation gave, and its own peak: the kernel's figure for ended
children would include the memory that the parent had when it forked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from casbackup.ids import DEFAULT_NAMESPACE, parse_disk, parse_vm
from casbackup.repository.repository import Repository

PROJECT = Path(__file__).resolve().parents[2]

# Operations import what they need: a process shows the cost of what it uses, as the command line does.


class Measured(NamedTuple):
    """``seconds``: the whole process; ``cpu_seconds``: of its processors, which other programs on the machine delay but
    hardly change; ``peak_bytes``: resident, pages of the mapped index included.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    result: dict[str, Any]


def run(operation: str, repository: str, *arguments: str) -> Measured:
    """Run an operation in a new process. Its output goes to ours if it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.measure", operation, repository, *arguments]
    started_s = time.monotonic()
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, check=True, text=True)
    seconds = time.monotonic() - started_s
    answer = json.loads(done.stdout)
    return Measured(seconds, answer["cpu_seconds"], answer["peak_bytes"], answer["result"])


def _nothing(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    return {}


def _snapshots(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    return {"snapshots": len(repository.catalog.all())}


def _stats(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    from casbackup.repository.accounting import account

    accounting = account(repository)
    single = [accounting.usage([snapshot]).unique_bytes for snapshot in accounting.snapshots]
    return {"stored_bytes": accounting.total().stored_bytes, "unique_bytes": sum(single)}


def _gc(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    from casbackup.repository.gc import execute_gc, plan_gc

    with repository.maintenance():
        plan = plan_gc(repository)
        report = execute_gc(repository, plan)
    return {
        "live_blobs": plan.live_blobs,
        "removed_blobs": report.removed_blobs,
        "dropped_packs": report.dropped_packs,
        "rewritten_packs": report.rewritten_packs,
        "freed_bytes": report.freed_bytes,
    }


def _check(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    from casbackup.repository.check import CheckOptions, check

    report = check(repository, CheckOptions(read_data=arguments == ["data"]))
    return {"damaged": report.damaged, "nodes": report.nodes, "blobs": report.blobs, "packs": report.packs}


def _forget(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    """The oldest so many of all snapshots."""
    removed = repository.catalog.all()[: int(arguments[0])]
    repository.catalog.remove(removed)
    return {"removed": len(removed)}


def _backup(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    """An image as the only disk of vm/1."""
    from casbackup.block.source import open_source
    from casbackup.jobs.backup import BackupRequest, DiskInput, backup
    from casbackup.jobs.segments import DeviceSegments
    from casbackup.peer.local import LocalPeer

    with open_source(arguments[0], format="raw") as device:
        disk = DiskInput(parse_disk("scsi0"), DeviceSegments(device), arguments[0])
        request = BackupRequest(DEFAULT_NAMESPACE, parse_vm("vm/1"), [disk])
        snapshot = backup(LocalPeer(repository), request)
    stats = snapshot.manifest.stats
    return {"read_bytes": stats.read_bytes, "new_bytes": stats.new_bytes, "sequence": snapshot.manifest.sequence}


def _next(repository: Repository, arguments: Sequence[str]) -> dict[str, Any]:
    """The next snapshot of a synthetic VM, by the shape given as JSON."""
    from tests.benchmarks.synthetic import Shape, add_snapshot, vm_name

    snapshot = add_snapshot(repository, Shape(**json.loads(arguments[0])), vm_name(0))
    return {"sequence": snapshot.manifest.sequence}


_OPERATIONS: dict[str, Callable[[Repository, Sequence[str]], dict[str, Any]]] = {
    "nothing": _nothing,
    "snapshots": _snapshots,
    "stats": _stats,
    "gc": _gc,
    "check": _check,
    "forget": _forget,
    "backup": _backup,
    "next": _next,
}


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(arguments: Sequence[str]) -> int:
    operation, path, *rest = arguments
    with Repository.open(path) as repository:
        result = _OPERATIONS[operation](repository, rest)
    print(json.dumps({"cpu_seconds": time.process_time(), "peak_bytes": _peak_bytes(), "result": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
