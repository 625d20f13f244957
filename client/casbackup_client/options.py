"""Options that several commands share, and the classes that lay out their help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from casbackup_client.app import App

F = TypeVar("F", bound=Callable[..., Any])

pass_app = click.make_pass_decorator(App)


def _remember(attribute: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that notes a global option in the ``App``. The one nearest to the command's end counts."""

    def note(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        app = context.find_object(App)
        if app is not None and value not in (None, False):
            setattr(app, attribute, value)

    return note


def _global(attribute: str, *declarations: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*declarations, expose_value=False, callback=_remember(attribute), **settings)


def _complete_profile(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    from casbackup_client.completion import profiles

    return profiles(incomplete)


_GLOBAL_OPTIONS = (
    _global(
        "repository_option",
        "-r",
        "--repo",
        metavar="PATH",
        type=click.Path(),
        help="The repository, a folder or https://host:port/NAME; default: that of the profile, or "
        "CASBACKUP_REPOSITORY.",
    ),
    _global(
        "profile_option",
        "--profile",
        metavar="NAME",
        shell_complete=_complete_profile,
        help="A profile of the configuration file.",
    ),
    _global(
        "namespace_option",
        "--namespace",
        metavar="NAME",
        help="The namespace; default: CASBACKUP_NAMESPACE, or `default`.",
    ),
    _global(
        "cacert_option",
        "--cacert",
        metavar="FILE",
        type=click.Path(),
        help="Trust these certificates of servers besides the system's; default: CASBACKUP_CACERT.",
    ),
    _global(
        "identity_option",
        "--identity",
        metavar="FILE",
        type=click.Path(),
        help="An identity of age that opens the repository's key; default: CASBACKUP_AGE_IDENTITY.",
    ),
    _global("json", "--json", is_flag=True, help="Print one JSON document, and errors as JSON."),
    _global(
        "quiet",
        "-q",
        "--quiet",
        is_flag=True,
        help="No progress and no summary, only what was asked for and errors.",
    ),
    _global("verbose", "-v", "--verbose", is_flag=True, help="More details."),
)
GLOBAL_NAMES = frozenset(
    {
        "--repo",
        "--profile",
        "--namespace",
        "--cacert",
        "--identity",
        "--json",
        "--quiet",
        "--verbose",
        "--help",
        "--version",
    }
)


def global_options(function: F) -> F:
    """Options that may stand before or after the command."""
    for option in reversed(_GLOBAL_OPTIONS):
        function = option(function)
    return function


def is_global(parameter: click.Parameter) -> bool:
    return not GLOBAL_NAMES.isdisjoint(parameter.opts)


class CommandWithSections(click.Command):
    """A command whose help lists its own options apart from the global ones."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)


def write_options(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """The two sections of options."""
    options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    for title, chosen in (
        ("Options", [p for p in options if not is_global(p)]),
        ("Global options", [p for p in options if is_global(p)]),
    ):
        records = [record for p in chosen if (record := p.get_help_record(context)) is not None]
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Like ``click.command``, with the global options and the sections of the help."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        return click.command(name, cls=CommandWithSections, **settings)(global_options(function))

    return decorate


def dry_run_option(what: str) -> Callable[[F], F]:
    return click.option("-n", "--dry-run", is_flag=True, help=f"Show what {what} would do, and change nothing.")


def _complete_reference(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Sequence[str]:
    from casbackup_client.completion import references

    return references(_context.find_object(App) or App(), incomplete)


def _complete_vm(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Sequence[str]:
    from casbackup_client.completion import vms

    return vms(context.find_object(App) or App(), incomplete)


def reference_argument(name: str = "reference", *, metavar: str = "REF") -> Callable[[F], F]:
    """A snapshot: ``vm/100``, ``vm/100@TIME``, ``vm/100@ID`` or an id's first digits."""
    return click.argument(name, metavar=metavar, shell_complete=_complete_reference)


def vm_argument(name: str = "vm", *, metavar: str = "VM", nargs: int = 1) -> Callable[[F], F]:
    """A VM, or with ``nargs`` -1 any number of them."""
    return click.argument(name, metavar=metavar, nargs=nargs, required=nargs > 0, shell_complete=_complete_vm)


class CommandGroup(click.Group):
    """A command with commands of its own: its help lists them, then the global options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        write_options(self, ctx, formatter)
