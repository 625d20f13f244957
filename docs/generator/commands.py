"""The command line as values, read from its click commands. Only what click has had since 8.1 is used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import click

from casbackup_client.cli import SECTIONS, cli
from casbackup_client.options import is_global


class Option(NamedTuple):
    """``-n, --dry-run`` or ``--to FOLDER``, and what it does."""

    spelling: str
    help: str


class Text(NamedTuple):
    """A paragraph; ``verbatim`` ones keep their lines."""

    lines: list[str]
    verbatim: bool


class Command(NamedTuple):
    """``name`` is what is typed after ``casbackup``."""

    name: str
    usage: str
    text: list[Text]
    options: list[Option]


class Tree(NamedTuple):
    """All commands by section, and the options that all have."""

    summary: str
    global_options: list[Option]
    sections: dict[str, list[Command]]


def read() -> Tree:
    context = click.Context(cli, info_name="casbackup")
    sections = {
        title: [command for name in names for command in _commands(name, cli.get_command(context, name))]
        for title, names in SECTIONS.items()
    }
    return Tree(cli.help or "", [_option(p) for p in _options(cli) if is_global(p)], sections)


def _commands(name: str, command: click.Command | None) -> Iterator[Command]:
    assert command is not None, name
    arguments = [p.metavar or p.name.upper() for p in command.params if isinstance(p, click.Argument) and p.name]
    own = [_option(p) for p in _options(command) if not is_global(p)]
    usage = " ".join(["casbackup", name, *(["[OPTIONS]"] if own else []), *arguments])
    yield Command(name, usage, list(_texts(command.help or "")), own)
    if isinstance(command, click.Group):
        for sub_name, sub_command in command.commands.items():
            yield from _commands(f"{name} {sub_name}", sub_command)


def _options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden]


def _option(parameter: click.Option) -> Option:
    if not parameter.is_flag and not parameter.metavar:
        raise ValueError(f"option {parameter.opts} has no metavar")
    spelling = ", ".join(sorted(parameter.opts, key=len))
    return Option(f"{spelling} {parameter.metavar}" if parameter.metavar else spelling, parameter.help or "")


def _texts(text: str) -> Iterator[Text]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.split("\n")
        verbatim = lines[0] == "\b"
        yield Text(lines[1:] if verbatim else lines, verbatim)
