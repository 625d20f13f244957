"""``casbackup restore``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import click

from casbackup.errors import CasbackupError, DataDamage, RestoreIncomplete
from casbackup_client.app import App
from casbackup_client.options import command, pass_app, reference_argument
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup.block.target import Target
    from casbackup.jobs.restore import RestoreReport
    from casbackup.peer.api import Peer
    from casbackup.progress import Progress
    from casbackup.repository.catalog import Snapshot
    from casbackup_client.documents import RestoreDocument
    from casbackup_client.targets import ConfigPlace, DiskPlace, Places
    from casbackup_client.views import View


@command("restore")
@reference_argument()
@click.option(
    "--to",
    "folder",
    metavar="FOLDER",
    type=click.Path(),
    help="Write FOLDER/DISK.raw for each disk, and the configs.",
)
@click.option(
    "--disk",
    "disks",
    metavar="DISK[=TARGET]",
    multiple=True,
    help="Only this disk; TARGET is a file or a block device. Repeatable.",
)
@click.option(
    "--vmstate",
    metavar="FILE",
    type=click.Path(),
    help="Write the VM's memory to FILE, for QEMU's -incoming; fails if the snapshot is without.",
)
@click.option(
    "--format",
    "image_format",
    metavar="FORMAT",
    help="Write images of this format, such as qcow2; default: raw.",
)
@click.option("--in-place", is_flag=True, help="Change an existing raw target where it differs, and nowhere else.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--best-effort", is_flag=True, help="Restore around damage: lost ranges become zeros and are listed.")
@click.option("--sync", is_flag=True, help="End only when everything has reached the disk.")
@pass_app
def restore(
    app: App,
    reference: str,
    folder: str | None,
    disks: tuple[str, ...],
    vmstate: str | None,
    image_format: str | None,
    in_place: bool,
    force: bool,
    best_effort: bool,
    sync: bool,
) -> None:
    """Restore a snapshot's disks, and verify all of it on the way.

    \b
    casbackup restore vm/100 --to out                  the latest, to out/scsi0.raw
    casbackup restore vm/100@2026-11-22T20 --to out    the one of that hour
    casbackup restore 1f3a9c2e --disk scsi0=/dev/vg0/disk
    casbackup restore vm/100 --disk scsi0=root.qcow2   an image of that format
    casbackup restore vm/100 --to out --vmstate state  also the memory, if it was backed up

    Files are sparse and get their names when all is complete. What exists is not overwritten without
    --force, nor is a block device that holds data; one that is mounted or otherwise in use needs --force,
    too. --in-place reads a target first and writes only what differs; interrupted, it leaves a mixture.
    After --best-effort with losses the exit status is 3.
    """
    from casbackup_client import targets

    _check_format(image_format)
    began_s = time.monotonic()
    with app.peer() as peer:
        snapshot = peer.find(reference, app.namespace)
        places = targets.plan(snapshot, folder, disks, image_format, vmstate)
        overwriting = targets.Overwriting(force, in_place)
        with (
            peer.reading(snapshot),
            targets.opened(places, overwriting) as opened,
            app.progress() as progress,
        ):
            run = _Run(peer, progress, in_place=in_place, best_effort=best_effort, sync=sync)
            outcome = run.all(places, opened)
    _show(app, snapshot, outcome, round((time.monotonic() - began_s) * 1000))


def _check_format(image_format: str | None) -> None:
    from casbackup.errors import UsageError
    from casbackup_client.targets import FORMATS

    if image_format is not None and image_format not in FORMATS:
        raise UsageError(f"disks cannot be restored as {image_format!r}; known are {', '.join(FORMATS)}")


class _Outcome(NamedTuple):
    """What was restored; a config whose content could not be had is in ``lost_configs`` too."""

    disks: list[tuple[DiskPlace, RestoreReport]]
    configs: list[ConfigPlace]
    lost_configs: list[ConfigPlace]

    @property
    def lost_ranges(self) -> int:
        return sum(len(report.lost) for _, report in self.disks)


class _Run:
    def __init__(self, peer: Peer, progress: Progress, *, in_place: bool, best_effort: bool, sync: bool) -> None:
        self._peer = peer
        self._progress = progress
        self._in_place = in_place
        self._best_effort = best_effort
        self._sync = sync

    def all(self, places: Places, opened: list[Target]) -> _Outcome:
        """Restore everything, then give it its names: after an error no new file is left."""
        contents = [self._config(place) for place in places.configs]
        reports = [self._disk(place, target) for place, target in zip(places.disks, opened, strict=True)]
        for target in opened:
            target.commit(sync=self._sync)
        return _Outcome(
            list(zip(places.disks, reports, strict=True)),
            places.configs,
            self._write_configs(places.configs, contents),
        )

    def _disk(self, place: DiskPlace, target: Target) -> RestoreReport:
        from casbackup.jobs.restore import RestoreOptions, restore_disk

        options = RestoreOptions(
            target_is_zero=target.starts_zero,
            in_place=self._in_place and not target.starts_zero,
            best_effort=self._best_effort,
        )
        try:
            return restore_disk(self._peer, place.disk, target.device, options, self._progress)
        except DataDamage as error:
            raise _named(f"disk {place.disk.name}", error) from error

    def _config(self, place: ConfigPlace) -> bytes | None:
        from casbackup.jobs.restore import read_config

        try:
            return read_config(self._peer, place.config)
        except DataDamage as error:
            if self._best_effort:
                return None
            raise _named(f"config {place.config.name}", error) from error

    def _write_configs(self, places: list[ConfigPlace], contents: list[bytes | None]) -> list[ConfigPlace]:
        from casbackup_client.targets import write_config

        lost: list[ConfigPlace] = []
        for place, content in zip(places, contents, strict=True):
            if content is None:
                lost.append(place)
            else:
                write_config(place.path, content, sync=self._sync)
        return lost


def _named(what: str, error: DataDamage) -> CasbackupError:
    return type(error)(f"{what}: {error}; nothing was restored, --best-effort restores the rest")


def _show(app: App, snapshot: Snapshot, outcome: _Outcome, duration_ms: int) -> None:
    app.output.result(
        _document(snapshot, outcome, duration_ms),
        lambda: _view(snapshot, outcome, duration_ms),
        essential=False,
    )
    if not outcome.lost_ranges and not outcome.lost_configs:
        return
    if app.quiet and not app.json:
        for line in _losses(outcome):
            app.output.complain(line)
    raise RestoreIncomplete(
        f"lost of {snapshot.reference}: {counted(outcome.lost_ranges, 'range')}, "
        f"{counted(len(outcome.lost_configs), 'config')}"
    )


def _document(snapshot: Snapshot, outcome: _Outcome, duration_ms: int) -> RestoreDocument:
    from casbackup_client.documenting import range_documents

    return {
        "snapshot": snapshot.reference,
        "id": snapshot.id,
        "disks": [
            {
                "disk": place.disk.name,
                "target": place.path,
                "size_bytes": report.size_bytes,
                "written_bytes": report.written_bytes,
                "unchanged_bytes": report.unchanged_bytes,
                "zero_bytes": report.zero_bytes,
                "lost_bytes": sum(item.length for item in report.lost),
                "lost": range_documents(report.lost),
            }
            for place, report in outcome.disks
        ],
        "configs": [
            {"config": place.config.name, "target": place.path, "lost": place in outcome.lost_configs}
            for place in outcome.configs
        ],
        "duration_ms": duration_ms,
    }


def _view(snapshot: Snapshot, outcome: _Outcome, duration_ms: int) -> View:
    from casbackup.units import format_duration
    from casbackup.units import format_size as size

    disks = [
        f"{place.path} {size(report.size_bytes)} (written {size(report.written_bytes)}"
        + (f", unchanged {size(report.unchanged_bytes)})" if report.unchanged_bytes else ")")
        for place, report in outcome.disks
    ]
    configs = [place.path for place in outcome.configs if place not in outcome.lost_configs]
    total = sum(report.size_bytes for _, report in outcome.disks)
    rate = f", {size(total / (duration_ms / 1000))}/s" if duration_ms and total else ""
    took = format_duration(duration_ms / 1000)
    done = f"restored {snapshot.reference}: {', '.join([*disks, *configs])}; {took}{rate}"
    return [done, *_ways_on(outcome), *_losses(outcome)]


def _ways_on(outcome: _Outcome) -> list[str]:
    """How a VM goes on whose memory was restored."""
    from shlex import quote

    paths = [place.path for place, report in outcome.disks if place.disk.role and not report.lost]
    return [
        f"to go on from there, start QEMU with the VM's own options and -incoming {quote(f'exec:cat {quote(path)}')}"
        for path in paths
    ]


def _losses(outcome: _Outcome) -> list[str]:
    ranges = [
        f"lost: {place.disk.name}, {item.length} bytes from byte {item.offset} on"
        for place, report in outcome.disks
        for item in report.lost
    ]
    return ranges + [f"lost: config {place.config.name}" for place in outcome.lost_configs]
