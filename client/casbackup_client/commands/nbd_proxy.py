"""``casbackup nbd-proxy``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import click

from casbackup.errors import DuplicateDisk, Interrupted, InvalidName, UsageError
from casbackup_client.app import App
from casbackup_client.nbd import NbdFlags, nbd_options, qemu_blockdev, started, uri, wait_for_signal
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from casbackup.block.device import BlockDevice
    from casbackup.block.filters.point_in_time import Policy
    from casbackup.block.nbd.uri import NbdAddress
    from casbackup.block.proxy import DiskProxy
    from casbackup.ids import DiskName
    from casbackup_client.documents import NbdProxyDocument
    from casbackup_client.views import View


def _complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


@command("nbd-proxy")
@click.argument("disks", metavar="[DISK=]SOURCE...", nargs=-1, required=True, shell_complete=_complete)
@nbd_options
@click.option(
    "--scratch-folder",
    metavar="FOLDER",
    type=click.Path(),
    help="Where temporary files keep what is overwritten during a backup; default: TMPDIR or /tmp.",
)
@click.option("--scratch-limit", metavar="SIZE", default="16GiB", help="How much of it for each disk; default: 16GiB.")
@click.option(
    "--on-failure",
    metavar="POLICY",
    type=click.Choice(["break-backup", "break-guest-write"]),
    default="break-backup",
    help="Who loses when that fails: break-backup (the default) or break-guest-write.",
)
@click.option(
    "--max-guest-stall",
    metavar="DURATION",
    default="2s",
    help="How long a write may wait for that before it counts as failed; default: 2s.",
)
@pass_app
def nbd_proxy(
    app: App,
    disks: tuple[str, ...],
    listen: str | None,
    tls_certificates: str | None,
    tls_verify_clients: bool,
    insecure: bool,
    scratch_folder: str | None,
    scratch_limit: str,
    on_failure: str,
    max_guest_stall: str,
) -> None:
    """Serve disks to a VM over NBD, so that they can be backed up while it writes, until SIGTERM or SIGINT.

    A SOURCE is a raw file, a block device or an NBD URI. The VM uses the export DISK, by default the file's name
    without its ending. A backup reads DISK@snapshot: the disk as it was at one instant, which is the same for all disks
    of the proxy and lasts from the first such connection to the last.

    \b
    casbackup nbd-proxy scsi0=root.raw scsi1=/dev/vg0/data --listen unix:/run/vm100.sock
    casbackup backup vm/100 'scsi0=nbd+unix:///scsi0@snapshot?socket=/run/vm100.sock' \\
                            'scsi1=nbd+unix:///scsi1@snapshot?socket=/run/vm100.sock'
    """
    flags = NbdFlags(listen, tls_certificates, tls_verify_clients, insecure)
    address = flags.address()
    from casbackup.block.proxy import DiskProxy
    from casbackup.block.sparse import temporary_device
    from casbackup.clock import SystemClock
    from casbackup.units import parse_size
    from casbackup_client.failedcalls import FailedCalls

    limit_bytes, policy = parse_size(scratch_limit), _policy(on_failure, max_guest_stall)
    with contextlib.ExitStack() as stack:
        opened = _opened(_named(disks), stack)
        scratch = partial(temporary_device, folder=scratch_folder)
        scratch(1).close()  # whether there can be any is better known now than at the first backup
        failed = FailedCalls(app.output.complain, SystemClock())
        proxy = stack.enter_context(
            DiskProxy(opened, scratch=scratch, limit_bytes=limit_bytes, policy=policy, report=failed.note)
        )
        _serve(app, flags, address, proxy, opened)


def _policy(on_failure: str, max_guest_stall: str) -> Policy:
    from casbackup.block.filters.point_in_time import OnFailure, Policy
    from casbackup.units import parse_duration

    return Policy(OnFailure(on_failure), parse_duration(max_guest_stall))


def _named(texts: tuple[str, ...]) -> dict[DiskName, str]:
    """:raise UsageError: for a bad or repeated name."""
    from casbackup.ids import parse_disk

    found: dict[DiskName, str] = {}
    for text in texts:
        name, source = _split(text)
        disk = parse_disk(name)
        if disk in found:
            raise DuplicateDisk(f"disk {disk} is given twice")
        found[disk] = source
    return found


def _split(text: str) -> tuple[str, str]:
    from casbackup.ids import parse_disk

    name, equals, source = text.partition("=")
    if equals and source:
        with contextlib.suppress(InvalidName):
            return parse_disk(name), source
    if "://" in text:
        raise UsageError(f"{text!r} needs a name: scsi0={text}")
    return os.path.splitext(os.path.basename(text))[0], text


def _opened(sources: Mapping[DiskName, str], stack: contextlib.ExitStack) -> dict[str, BlockDevice]:
    """All disks, writable, and nobody else's while they are open. On an error those opened are closed."""
    from casbackup.block.image_lock import ImageLock
    from casbackup.block.nbd.client import NbdClient
    from casbackup.block.nbd.uri import is_nbd_uri
    from casbackup.block.rawfile import RawFile

    opened: dict[str, BlockDevice] = {}
    for name, source in sources.items():
        if is_nbd_uri(source):
            opened[name] = stack.enter_context(NbdClient.connect(source))
        else:
            stack.enter_context(ImageLock(source))
            opened[name] = stack.enter_context(RawFile.open(source, writable=True))
        if not opened[name].capabilities.writable:
            raise UsageError(f"{source} is read-only: a VM could not write to it")
    return opened


def _serve(app: App, flags: NbdFlags, address: NbdAddress, proxy: DiskProxy, disks: Mapping[str, BlockDevice]) -> None:
    with started(app, flags, proxy.exports) as server, contextlib.suppress(Interrupted):
        document = _document(server.listen(address), flags, disks)
        app.output.result(document, lambda: _view(document), essential=False)
        sys.stdout.flush()
        wait_for_signal()


def _document(address: NbdAddress, flags: NbdFlags, disks: Mapping[str, BlockDevice]) -> NbdProxyDocument:
    from casbackup.block.proxy import SNAPSHOT_SUFFIX

    return {
        "exports": [
            {
                "disk": name,
                "size_bytes": disk.size_bytes,
                "writable": True,
                "uri": uri(address, name, flags),
                "snapshot_uri": uri(address, name + SNAPSHOT_SUFFIX, flags),
                "qemu": qemu_blockdev(address, name, flags, read_only=False, lasting=True),
            }
            for name, disk in disks.items()
        ]
    }


def _view(document: NbdProxyDocument) -> View:
    from casbackup.units import format_size

    lines = ["serving until SIGTERM or SIGINT"]
    for export in document["exports"]:
        lines += [
            "",
            f"{export['disk']} {format_size(export['size_bytes'])}",
            f"  VM:     {export['qemu']}",
            f"  backup: {export['disk']}={export['snapshot_uri']}",
        ]
    return lines
