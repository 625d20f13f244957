"""``casbackup archive``: archives of other formats, without any repository."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from casbackup.errors import UsageError
from casbackup_client.app import App
from casbackup_client.archives import PIPE, file_argument, format_option, opened_input
from casbackup_client.commands.archive_extract import extract, salvage
from casbackup_client.commands.archive_verify import verify
from casbackup_client.commands.export import format_options
from casbackup_client.options import CommandGroup, command, global_options, pass_app

if TYPE_CHECKING:
    from collections.abc import Iterable

    from casbackup.formats.port import ArchiveFormat, ArchiveHead
    from casbackup_client.documents import ArchiveListDocument, FormatDocument
    from casbackup_client.views import View

_DEFAULT_CONFIG = "qemu-server.conf"


@click.group("archive", cls=CommandGroup)
@global_options
def archive() -> None:
    """Look at archives of other formats, take them apart, convert them: no repository is needed.

    FILE may be compressed (zstd, gzip, lzop, bzip2, xz); - is standard input.
    """


@command("list")
@file_argument
@format_option
@click.option("--vma", "as_vma", is_flag=True, help="Print the lines that `vma list` prints, for scripts.")
@pass_app
def list_(app: App, path: str, format_name: str | None, as_vma: bool) -> None:
    """List an archive's disks and configs. Only its head is read."""
    with opened_input(path, format_name) as given:
        opened, _ = given.open()
        head = opened.head
    if as_vma and not app.json:
        for line in _vma_lines(head):
            sys.stdout.write(line + "\n")
        return
    document = _list_document(path, given.format, head)
    app.output.result(document, lambda: _list_view(document))


def _vma_lines(head: ArchiveHead) -> Iterable[str]:
    """As the reference program prints them; names that are no text as it would write them, escaped."""
    for config in head.configs:
        yield f"CFG: size: {len(config.content)} name: {config.name}"
    for number, disk in enumerate(head.disks, 1):
        device = disk.device_id if disk.device_id is not None else number
        if disk.is_vmstate:
            yield f"VMSTATE: dev_id={device} memory: {disk.size_bytes}"
        else:
            yield f"DEV: dev_id={device} size: {disk.size_bytes} devname: {disk.name}"
    yield f"CTIME: {time.ctime(head.time_s or 0)}"


def _list_document(path: str, archive_format: ArchiveFormat, head: ArchiveHead) -> ArchiveListDocument:
    from casbackup.formats.names import disk_names

    names = disk_names(disk.name for disk in head.disks)
    return {
        "archive": path,
        "format": archive_format.name,
        "uuid": None if head.uuid is None else head.uuid.hex(),
        "time": _time(head.time_s),
        "time_s": head.time_s,
        "disks": [
            {
                "name": disk.name,
                "disk": name,
                "size_bytes": disk.size_bytes,
                "device_id": disk.device_id,
                "vmstate": disk.is_vmstate,
            }
            for name, disk in zip(names, head.disks, strict=True)
        ],
        "configs": [{"name": config.name, "size_bytes": len(config.content)} for config in head.configs],
    }


def _time(time_s: int | None) -> str | None:
    """None also for a time that has no name."""
    from casbackup.clock import format_time

    try:
        return None if time_s is None else format_time(time_s * 1000)
    except (ValueError, OverflowError, OSError):
        return None


def _list_view(document: ArchiveListDocument) -> View:
    from casbackup.units import format_size as size
    from casbackup_client.views import Fields, Table

    fields = [("format", document["format"])]
    fields += [(key, str(document[key])) for key in ("uuid", "time") if document[key] is not None]
    view: list[str | Table | Fields] = [Fields(fields)]
    if document["disks"]:
        rows = [
            (
                disk["name"],
                disk["disk"],
                size(disk["size_bytes"]),
                "" if disk["device_id"] is None else str(disk["device_id"]),
                "VM state" if disk["vmstate"] else "disk",
            )
            for disk in document["disks"]
        ]
        view += ["", Table(("name", "disk", ">size", ">id", "kind"), rows)]
    if document["configs"]:
        configs = [(config["name"], str(config["size_bytes"])) for config in document["configs"]]
        view += ["", Table(("config", ">bytes"), configs)]
    return view


@command("config")
@file_argument
@click.argument("name", metavar="[NAME]", default=_DEFAULT_CONFIG)
@format_option
@pass_app
def config(app: App, path: str, name: str, format_name: str | None) -> None:
    """Print a config of an archive, by default qemu-server.conf. Only the archive's head is read."""
    with opened_input(path, format_name) as given:
        head = given.open()[0].head
    found = [item.content for item in head.configs if item.name == name]
    if not found:
        names = ", ".join(item.name for item in head.configs) or "none"
        raise UsageError(f"the archive has no config {name}; it has: {names}")
    content = found[-1]
    if app.json:
        text = content.decode("utf-8", "backslashreplace")
        app.output.result({"archive": path, "name": name, "content": text}, list)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


@command("convert")
@file_argument
@click.argument("target", metavar="TARGET", type=click.Path())
@click.option("--from", "from_format", metavar="FORMAT", help="Of FILE; default: told by its first bytes.")
@format_options
@click.option("--spool", "spool_folder", metavar="FOLDER", type=click.Path(), help="For temporary files.")
@pass_app
def convert(
    app: App,
    path: str,
    target: str,
    from_format: str | None,
    format_name: str | None,
    compression: str | None,
    options: tuple[str, ...],
    force: bool,
    spool_folder: str | None,
) -> None:
    """Convert an archive to another format: TARGET is a file, or - for standard output.

    \b
    casbackup archive convert vzdump-qemu-100-...vma.zst web.qcow2
    casbackup archive convert web.vmdk - --vma | qmrestore - 100

    Where the orders of the two formats do not fit, the data goes through a temporary file, in the folder of TARGET
    if --spool names no other; it is as large as the data.
    """
    from casbackup.jobs.convert import adapted
    from casbackup.jobs.convert import convert as run_convert
    from casbackup_client import archives

    if target == PIPE and app.json:
        raise UsageError("--json and the archive cannot both go to standard output")
    archive_format = archives.format_to_write(format_name, target)
    used_compression = archives.compression_to_write(compression, target)
    writer = archives.writer_of(archive_format, options)
    began_s = time.monotonic()
    with opened_input(path, from_format) as given:
        opened, reader = given.open()
        head, left_out = adapted(opened.head, writer, int(time.time()))
        with (
            archives.opened_target(target, used_compression, writer, force=force) as output,
            app.progress() as progress,
        ):
            run_convert(
                opened,
                reader.capabilities.order,
                head,
                writer,
                output,
                spool_folder=spool_folder or _folder_of(target),
                progress=progress,
            )
    for name in left_out:
        app.output.complain(f"config {name} is not in it: format {archive_format.name} holds none")
    if target != PIPE:
        size_bytes = sum(disk.size_bytes for disk in head.disks)
        app.output.result(
            {
                "source": path,
                "source_format": given.format.name,
                "target": target,
                "format": archive_format.name,
                "compression": used_compression,
                "size_bytes": size_bytes,
                "left_out": list(left_out),
                "duration_ms": round((time.monotonic() - began_s) * 1000),
            },
            lambda: [f"converted {path} ({given.format.name}) to {target} ({archive_format.name})"],
            essential=False,
        )


def _folder_of(target: str) -> str | None:
    return None if target == PIPE else os.path.dirname(os.path.abspath(target))


@command("formats")
@pass_app
def formats(app: App) -> None:
    """List the formats of archives that can be read and written, plugins included."""
    from casbackup.formats.registry import all_formats, broken_formats

    found = [_format_document(item) for item in all_formats()]
    broken = [str(error) for error in broken_formats()]
    app.output.result({"formats": found, "broken": broken}, lambda: _formats_view(found, broken))


def _format_document(item: ArchiveFormat) -> FormatDocument:
    reader = None if item.reader is None else item.reader().capabilities
    writer = None if item.writer is None else item.writer().capabilities
    return {
        "name": item.name,
        "summary": item.summary,
        "suffixes": list(item.suffixes),
        "reads": reader is not None,
        "reads_pipes": reader is not None and reader.streams,
        "writes": writer is not None,
        "writes_pipes": writer is not None and writer.streams,
        "max_disks": None if writer is None else writer.max_disks,
        "configs": writer is not None and writer.configs,
        "vmstate": writer is not None and writer.vmstate,
        "verifies": item.verifier is not None,
        "salvages": item.salvager is not None,
        "options": [{"name": name, "meaning": meaning} for name, meaning in item.options],
    }


def _formats_view(found: list[FormatDocument], broken: list[str]) -> View:
    from casbackup_client.views import Table

    def how(can: bool, pipes: bool) -> str:
        return "" if not can else "pipe" if pipes else "file"

    rows = [
        (
            item["name"],
            how(item["reads"], item["reads_pipes"]),
            how(item["writes"], item["writes_pipes"]),
            "" if item["max_disks"] is None else str(item["max_disks"]),
            "yes" if item["configs"] else "no",
            " ".join(item["suffixes"]),
            item["summary"],
        )
        for item in found
    ]
    options = [
        f"{item['name']}: -o {option['name']}=…: {option['meaning']}" for item in found for option in item["options"]
    ]
    table = Table(("format", "read from", "written to", ">disks", "configs", "files", "is"), rows)
    return [table, *([""] if options else []), *options, *(f"broken: {text}" for text in broken)]


for _command in (list_, config, verify, extract, salvage, convert, formats):
    archive.add_command(_command)
