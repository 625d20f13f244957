"""The root of the command tree. It knows the names and one line of help of all commands, and loads the one
that is run.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import click

from casbackup_client.options import global_options, write_options


class Entry(NamedTuple):
    """Where a command is, ``module:attribute`` below ``casbackup_client.commands``, and what it does in a
    line.
    """

    place: str
    summary: str


COMPLETION_VARIABLE = "_CASBACKUP_COMPLETE"
"""What click's completion scripts set."""

SECTIONS: dict[str, dict[str, Entry]] = {
    "Main job": {
        "init": Entry("init:init", "Create a repository."),
        "backup": Entry("backup:backup", "Back up the disks of a VM as a snapshot."),
        "restore": Entry("restore:restore", "Restore a snapshot's disks to files or devices."),
        "dump": Entry("dump:dump", "Write a disk, a part of one, or a config to stdout."),
    },
    "Use in place": {
        "nbd-serve": Entry("nbd_serve:nbd_serve", "Serve a snapshot's disks over NBD."),
        "mount": Entry("mount:mount", "Mount snapshots as a folder of files."),
        "nbd-proxy": Entry("nbd_proxy:nbd_proxy", "Serve a disk to a VM, with backups while it runs."),
    },
    "Inspect": {
        "snapshots": Entry("snapshots:snapshots", "List snapshots."),
        "show": Entry("snapshots:show", "Show all about a snapshot."),
        "diff": Entry("diff:diff", "Show where two snapshots differ."),
        "stats": Entry("stats:stats", "Show what snapshots and VMs cost."),
    },
    "Maintain": {
        "forget": Entry("forget:forget", "Remove snapshots, by a retention policy or by name."),
        "gc": Entry("gc:gc", "Free the space that no snapshot needs."),
        "check": Entry("check:check", "Verify the repository."),
        "repair": Entry("repair:repair", "Repair what can be repaired."),
        "pin": Entry("annotate:pin", "Protect a snapshot from being forgotten."),
        "label": Entry("annotate:label", "Change a snapshot's labels and notes."),
    },
    "Exchange": {
        "sync": Entry("sync:sync", "Copy snapshots to another repository."),
        "export": Entry("export:export", "Export a snapshot as VMA, tar, qcow2, VMDK or raw."),
        "import": Entry("import_:import_", "Import an archive as a snapshot."),
        "archive": Entry("archive:archive", "List, verify, extract, rescue, convert archives."),
    },
    "Administer": {
        "serve": Entry("serve:serve", "Serve repositories over HTTP."),
        "gateway": Entry("gateway:gateway", "Serve restores of an encrypted repository on this machine."),
        "server-job": Entry("server_job:server_job", "Start or watch gc, check and other jobs of a server."),
        "token": Entry("token:token", "Manage who may use a repository over HTTP."),
        "key": Entry("key:key", "Manage the keys of encrypted repositories."),
        "migrate": Entry("migrate:migrate", "Bring a repository to the current format."),
        "sessions": Entry("sessions:sessions", "List or abort backups that are under way or were interrupted."),
        "job": Entry("job:job", "List or steer backups of running VMs."),
        "completion": Entry("about:completion", "Print a shell's completion script."),
        "version": Entry("about:version", "Show the version."),
    },
}

_ENTRIES = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run, and whose own help imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _ENTRIES.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.place.partition(":")
        found: click.Command = getattr(import_module(f"casbackup_client.commands.{module}"), attribute)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _ENTRIES and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"there is no command {args[0]!r}{_suggestion(args[0])}")
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<10}", entry.summary) for name, entry in section.items()])
        write_options(self, ctx, formatter)


def _suggestion(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, _ENTRIES, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from casbackup import __version__

        click.echo(f"casbackup {__version__}")
        context.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`casbackup COMMAND --help` explains a command. Repository and namespace may also come from "
    "the environment (CASBACKUP_REPOSITORY, CASBACKUP_NAMESPACE) or a profile of "
    "~/.config/casbackup/config.toml.",
)
@global_options
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version.",
)
def cli() -> None:
    """Deduplicating backups of virtual machine disks."""
