"""``casbackup dump``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

import click

from casbackup.errors import InvalidSize, SnapshotNotFound, TargetUnwritable, UsageError
from casbackup.units import parse_size
from casbackup_client.app import App
from casbackup_client.options import command, pass_app, reference_argument

if TYPE_CHECKING:
    from casbackup.peer.api import Peer
    from casbackup.progress import Progress
    from casbackup.repository.catalog import Snapshot
    from casbackup_client.documents import DumpDocument

STDOUT = "-"


@command("dump")
@reference_argument()
@click.argument("disk", metavar="[DISK]", required=False)
@click.option("--config", metavar="NAME", help="Write this config instead of a disk.")
@click.option("--offset", metavar="SIZE", type=parse_size, default="0", help="Begin there; default: at the beginning.")
@click.option("--length", metavar="SIZE", type=parse_size, help="Write so much; default: up to the end.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default=STDOUT,
    type=click.Path(),
    help="Write to a new file; default: stdout.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@pass_app
def dump(
    app: App,
    reference: str,
    disk: str | None,
    config: str | None,
    offset: int,
    length: int | None,
    output: str,
    force: bool,
) -> None:
    """Write a disk of a snapshot, a part of one, or a config to standard output.

    \b
    casbackup dump vm/100 scsi0 | ssh host 'cat > /dev/vg0/disk'
    casbackup dump vm/100 scsi0 --offset 1MiB --length 512 | xxd
    casbackup dump vm/100 --config 100.conf
    """
    if (disk is None) == (config is None):
        raise UsageError("what to dump? Give a DISK or --config NAME, one of them")
    if output == STDOUT and app.json:
        raise UsageError("--json and the data cannot both go to standard output: give -o FILE")
    with app.peer() as peer:
        snapshot = peer.find(reference, app.namespace)
        with peer.reading(snapshot), app.progress() as progress:
            pieces, start, size = (
                _config(peer, snapshot, config) if config else _disk(peer, snapshot, disk or "", offset, length)
            )
            with _destination(output, force=force) as file, pieces as content:
                _copy(content, file, progress, disk or config or "", size)
    document: DumpDocument = {
        "snapshot": snapshot.reference,
        "disk": disk,
        "config": config,
        "target": output,
        "offset_bytes": start,
        "length_bytes": size,
    }
    if output != STDOUT:
        app.output.result(document, lambda: [f"wrote {size} bytes to {output}"], essential=False)


Content = contextlib.AbstractContextManager[Iterator[bytearray] | Iterator[bytes]]


def _disk(peer: Peer, snapshot: Snapshot, name: str, offset: int, length: int | None) -> tuple[Content, int, int]:
    from casbackup.jobs.restore import find_disk
    from casbackup.peer.disk import SnapshotDisk
    from casbackup_client.readahead import ReadAhead

    disk = find_disk(snapshot, name)
    size = disk.size_bytes - offset if length is None else length
    if size < 0 or offset + size > disk.size_bytes:
        raise InvalidSize(
            f"disk {name} has {disk.size_bytes} bytes: {offset} and {max(size, 0)} more are beyond its end"
        )
    reader = ReadAhead(SnapshotDisk(peer, disk), offset, size)

    @contextlib.contextmanager
    def content() -> Iterator[Iterator[bytearray]]:
        with reader:
            yield iter(reader)

    return content(), offset, size


def _config(peer: Peer, snapshot: Snapshot, name: str) -> tuple[Content, int, int]:
    from casbackup.jobs.restore import read_config

    for config in snapshot.manifest.configs:
        if config.name == name:
            data = read_config(peer, config)
            return contextlib.nullcontext(iter([data])), 0, len(data)
    names = ", ".join(config.name for config in snapshot.manifest.configs) or "none"
    raise SnapshotNotFound(f"snapshot {snapshot.reference} has no config {name}; it has: {names}")


@contextlib.contextmanager
def _destination(path: str, *, force: bool) -> Iterator[BinaryIO]:
    """Standard output, or a file that gets its name when it is complete."""
    if path == STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    from casbackup.block.pending import PendingFile

    pending = PendingFile(path, replace=force)
    try:
        with open(pending.temporary, "wb", buffering=0) as file:
            yield cast(BinaryIO, file)
        pending.publish(sync=False)
    except OSError as error:
        raise TargetUnwritable(f"{path}: {error.strerror}") from error
    finally:
        pending.discard()


def _copy(
    content: Iterator[bytearray] | Iterator[bytes], file: BinaryIO, progress: Progress, title: str, size: int
) -> None:
    progress.start(title, size)
    for piece in content:
        view = memoryview(piece)
        while view:
            view = view[file.write(view) :]
        progress.advance(done=len(piece))
    progress.finish()
