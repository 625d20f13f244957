"""``casbackup nbd-serve``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from casbackup.errors import Interrupted, UsageError
from casbackup_client.app import App
from casbackup_client.caching import cache_option, parse_cache
from casbackup_client.nbd import NbdFlags, nbd_options, qemu_blockdev, started, uri, wait_for_signal
from casbackup_client.options import command, pass_app, reference_argument

if TYPE_CHECKING:
    from casbackup.block.device import BlockDevice
    from casbackup.block.filters.overlay import Overlay
    from casbackup.block.nbd.uri import NbdAddress
    from casbackup.ids import DiskName, VmName
    from casbackup.peer.api import Peer
    from casbackup.peer.served import ServedSnapshot
    from casbackup.repository.catalog import Snapshot
    from casbackup_client.documents import NbdExportDocument, NbdServeDocument
    from casbackup_client.views import View


@command("nbd-serve")
@reference_argument()
@click.option("--disk", "names", metavar="DISK", multiple=True, help="Only this disk. Repeatable.")
@nbd_options
@click.option("--writable", is_flag=True, help="Let clients write; what they write goes to a temporary file.")
@click.option(
    "--overlay-folder",
    metavar="FOLDER",
    type=click.Path(),
    help="Where the temporary files of --writable are; default: TMPDIR or /tmp.",
)
@click.option("--save-as", metavar="VM", help="With --writable: at the end, save what there is as a snapshot of VM.")
@cache_option
@pass_app
def nbd_serve(
    app: App,
    reference: str,
    names: tuple[str, ...],
    listen: str | None,
    tls_certificates: str | None,
    tls_verify_clients: bool,
    insecure: bool,
    writable: bool,
    overlay_folder: str | None,
    save_as: str | None,
    cache: str | None,
) -> None:
    """Serve a snapshot's disks over NBD, until SIGTERM or SIGINT.

    \b
    casbackup nbd-serve vm/100
    casbackup nbd-serve vm/100@2026-11-22T20 --disk scsi0 --listen unix:/run/vm100.sock
    casbackup nbd-serve vm/100 --writable --save-as vm/100-fixed

    Each disk is an export of its name, which QEMU, nbdcopy, qemu-img and nbd-client can use; how, is printed. All
    that is read is verified: what is lost is an I/O error for the client and a line here. While it is served the
    snapshot's data stays, even if the snapshot is forgotten.

    With --writable the snapshot does not change either. --save-as stores only what was written, when the first
    signal comes; end the clients before. A second signal ends at once, and saves nothing.
    """
    flags = NbdFlags(listen, tls_certificates, tls_verify_clients, insecure)
    address = flags.address()
    vm = _save_name(save_as, overlay_folder, writable=writable)
    cache_bytes = parse_cache(cache)
    from casbackup.peer.served import ReadPool, ServedSnapshot

    with app.peer(outlives_signals=vm is not None) as peer:
        snapshot = peer.find(reference, app.namespace)
        disks = _chosen(snapshot, names)
        if vm is not None:
            _require_writable(app, peer, vm)
        with (
            ReadPool(peer, cache_bytes) as pool,
            ServedSnapshot(pool, snapshot, report=app.output.complain) as served,
            contextlib.ExitStack() as stack,
        ):
            overlays = _overlays(app, served, disks, overlay_folder, stack) if writable else {}
            _serve(app, flags, address, snapshot, {name: overlays.get(name, served.disks[name]) for name in disks})
            if vm is not None:
                _save(app, peer, snapshot, vm, overlays)


def _save_name(save_as: str | None, overlay_folder: str | None, *, writable: bool) -> VmName | None:
    from casbackup.ids import parse_vm

    if not writable and (save_as or overlay_folder):
        raise UsageError("--save-as and --overlay-folder need --writable")
    return None if save_as is None else parse_vm(save_as)


def _chosen(snapshot: Snapshot, names: Sequence[str]) -> list[DiskName]:
    """The disks to serve; the state of a VM only if it is named.

    :raise SnapshotNotFound: when one is not there, or there are none.
    """
    from casbackup.errors import SnapshotNotFound
    from casbackup.jobs.restore import find_disk

    if names:
        return [find_disk(snapshot, name).name for name in dict.fromkeys(names)]
    disks = [disk.name for disk in snapshot.manifest.disks if not disk.role]
    if not disks:
        raise SnapshotNotFound(f"snapshot {snapshot.reference} has no disks")
    return disks


def _require_writable(app: App, peer: Peer, vm: VmName) -> None:
    """What was written must not be lost because of something that could have been known before."""
    peer.open_session(app.namespace, vm).abort()


def _overlays(
    app: App, served: ServedSnapshot, disks: Sequence[DiskName], folder: str | None, stack: contextlib.ExitStack
) -> dict[DiskName, Overlay]:
    """``stack`` closes them."""
    from casbackup.block.filters.overlay import Overlay
    from casbackup.block.filters.trace import Trace
    from casbackup.block.sparse import temporary_device
    from casbackup.clock import SystemClock
    from casbackup_client.failedcalls import FailedCalls

    failed = FailedCalls(app.output.complain, SystemClock())

    def overlay(name: DiskName) -> Overlay:
        disk = served.disks[name]
        written = Trace(temporary_device(disk.size_bytes, folder), partial(failed.note, name))
        return stack.enter_context(Overlay(disk, written))

    return {name: overlay(name) for name in disks}


def _serve(
    app: App,
    flags: NbdFlags,
    address: NbdAddress,
    snapshot: Snapshot,
    devices: Mapping[DiskName, BlockDevice],
) -> None:
    from casbackup.block.guard import Guarded
    from casbackup.block.nbd.exports import Export

    exports = [Export.of(name, Guarded(device), description=snapshot.reference) for name, device in devices.items()]
    with started(app, flags, exports) as server, contextlib.suppress(Interrupted):
        document = _document(snapshot, server.listen(address), flags, devices)
        app.output.result(document, lambda: _view(document), essential=False)
        sys.stdout.flush()
        wait_for_signal()


def _document(
    snapshot: Snapshot, address: NbdAddress, flags: NbdFlags, devices: Mapping[DiskName, BlockDevice]
) -> NbdServeDocument:
    return {
        "snapshot": snapshot.reference,
        "id": snapshot.id,
        "exports": [_export(address, name, flags, device) for name, device in devices.items()],
    }


def _export(address: NbdAddress, name: DiskName, flags: NbdFlags, device: BlockDevice) -> NbdExportDocument:
    """What was written to a writable one ends with this server, so a VM must not go on with the next."""
    writable = device.capabilities.writable
    return {
        "disk": name,
        "size_bytes": device.size_bytes,
        "writable": writable,
        "uri": uri(address, name, flags),
        "qemu": qemu_blockdev(address, name, flags, read_only=not writable, lasting=not writable),
    }


def _view(document: NbdServeDocument) -> View:
    from casbackup.units import format_size

    lines = [f"serving {document['snapshot']} until SIGTERM or SIGINT"]
    for export in document["exports"]:
        how = "writable" if export["writable"] else "read-only"
        lines += [
            "",
            f"{export['disk']} {format_size(export['size_bytes'])}, {how}",
            f"  {export['uri']}",
            f"  {export['qemu']}",
        ]
    return lines


def _save(app: App, peer: Peer, base: Snapshot, vm: VmName, overlays: Mapping[DiskName, Overlay]) -> None:
    """Until it succeeds: what was written is nowhere else."""
    from casbackup.jobs.save import SaveRequest, save_changes
    from casbackup_client.commands.backup import host, program, summary
    from casbackup_client.documenting import snapshot_document
    from casbackup_client.failures import as_failure
    from casbackup_client.signals import signals_raise

    request = SaveRequest(base, app.namespace, vm, host=host(), program=program())
    while True:
        try:
            with app.progress() as progress:
                snapshot = save_changes(peer, request, overlays, progress)
            break
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001  whatever it was, it must not end the process
            failure = as_failure(error)
        with signals_raise(), contextlib.suppress(Interrupted):
            app.output.complain(f"{vm} could not be saved: {failure.message}")
            app.output.complain("what was written is still there: SIGTERM tries again, SIGQUIT gives it up")
            wait_for_signal()
    app.output.result({"snapshot": snapshot_document(snapshot)}, lambda: summary(snapshot), essential=False)
