"""``casbackup mount``."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from casbackup.errors import MountpointUnusable, ToolMissing, UsageError
from casbackup_client.app import App
from casbackup_client.caching import cache_option, parse_cache
from casbackup_client.options import command, pass_app
from casbackup_client.signals import leave_soon

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from casbackup.peer.api import Peer
    from casbackup_client.snapshottree import Folder

_DEVICE = "/dev/fuse"


def _complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from casbackup_client.completion import references

    found = references(context.find_object(App) or App(), incomplete)
    return [*map(CompletionItem, found), CompletionItem(incomplete, type="dir")]


@command("mount")
@click.argument("places", metavar="[REF] FOLDER", nargs=-1, required=True, shell_complete=_complete)
@click.option("--allow-other", is_flag=True, help="Let other users look, too; /etc/fuse.conf must allow it.")
@cache_option
@pass_app
def mount(app: App, places: tuple[str, ...], allow_other: bool, cache: str | None) -> None:
    """Mount snapshots as a folder of files, until it is unmounted or a signal comes.

    \b
    casbackup mount vm/100@latest /mnt           /mnt/scsi0.raw, /mnt/100.conf
    casbackup mount vm/100 /mnt                  /mnt/2026-11-22T20:00:00.123Z/scsi0.raw
    casbackup mount /mnt                         /mnt/default/vm/100/2026-11-22T20:00:00.123Z/scsi0.raw
    umount /mnt

    Disks are sparse files that cannot be written to. All that is read is verified: what is lost is an I/O error, and a
    line here says why. A snapshot's data stays while one of its files is open, even if the snapshot is forgotten; for
    a single snapshot, while it is mounted. New snapshots appear by themselves.
    """
    *references, folder = places
    if len(references) > 1:
        raise UsageError("give a snapshot or a VM, or nothing, and the folder to mount it on")
    cache_bytes = parse_cache(cache)
    _require_mountable(folder)
    try:
        from casbackup_client import fusefs
    except (ImportError, OSError) as error:
        raise ToolMissing(
            f"mounting needs libfuse (Debian: fuse3) and mfusepy (pip install 'casbackup[fuse]'): {error}"
        ) from error
    from casbackup.clock import SystemClock
    from casbackup.peer.served import ReadPool
    from casbackup_client.openfiles import OpenFiles

    with app.peer() as peer, contextlib.ExitStack() as stack:
        tree = _tree(app, peer, references[0] if references else None, stack)
        pool = stack.enter_context(ReadPool(peer, cache_bytes))
        files = stack.enter_context(OpenFiles(pool, app.output.complain))
        operations = fusefs.SnapshotFiles(tree, files, SystemClock(), app.output.complain, for_all=allow_other)
        fusefs.serve(operations, folder)
        leave_soon()  # libfuse has had the signal


def _require_mountable(folder: str) -> None:
    """:raise ToolMissing: / :raise MountpointUnusable: when it could not be mounted there anyway."""
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise ToolMissing(f"{_DEVICE} is not there, or may not be used: mounting needs it")
    try:
        if os.listdir(folder):
            raise MountpointUnusable(f"{folder} is not empty")
    except OSError as error:
        advice = f"; an earlier mount there was killed: umount {folder}" if error.errno == errno.ENOTCONN else ""
        raise MountpointUnusable(f"{folder}: {error.strerror}{advice}") from error


def _tree(app: App, peer: Peer, reference: str | None, stack: contextlib.ExitStack) -> Callable[[], Folder]:
    """What gives the tree as it is now. ``stack`` keeps a single snapshot.

    :raise SnapshotNotFound: when there is no such snapshot, or nothing of that VM.
    """
    from casbackup.errors import InvalidName, SnapshotNotFound
    from casbackup.ids import parse_namespace, parse_vm
    from casbackup_client.snapshottree import alone, by_time, by_vm, tree_of

    if reference is None:
        only = parse_namespace(app.namespace_option) if app.namespace_option else None
        return lambda: tree_of(peer.survey(only)[0], by_vm)
    before, _, name = reference.rpartition(":")
    try:
        vm = parse_vm(name)
    except InvalidName:  # so it names a snapshot
        snapshot = peer.find(reference, app.namespace)
        stack.enter_context(peer.reading(snapshot))
        single = tree_of([snapshot], alone)
        return lambda: single
    namespace = parse_namespace(before) if before else app.namespace
    if not peer.survey(namespace, vm)[0]:
        raise SnapshotNotFound(f"there is no snapshot of {vm} in namespace {namespace}")
    return lambda: tree_of(peer.survey(namespace, vm)[0], by_time)
