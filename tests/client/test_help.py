"""The lazy list of commands, the help, the completion and the generated documentation agree with the
commands.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from casbackup_client.cli import SECTIONS, cli
from casbackup_client.options import GLOBAL_NAMES, is_global

from .conftest import ROOT, Casbackup

CONTEXT = click.Context(cli, info_name="casbackup")
ENTRIES = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_static_list_agrees_with_the_commands(name: str) -> None:
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    assert command.name == name
    assert command.help
    own = [p for p in command.params if isinstance(p, click.Option) and not is_global(p)]
    shared = [p for p in command.params if is_global(p)]
    assert len(shared) == len(GLOBAL_NAMES - {"--help", "--version"})
    assert all(option.help for option in own)


def test_every_module_of_commands_is_listed() -> None:
    """Subcommands may be in modules that are called after their group, such as ``archive_verify``."""
    listed = {entry.place.partition(":")[0] for entry in ENTRIES.values()}
    modules = {path.stem for path in (ROOT / "client/casbackup_client/commands").glob("*.py")} - {"__init__"}
    assert listed <= modules
    assert {name for name in modules if name not in listed and name.partition("_")[0] not in listed} == set()


def test_help_is_grouped(bare: Casbackup) -> None:
    text = bare.ok("--help").text
    assert text == bare.ok().text == bare.ok("-h").text
    places = [text.index(f"\n{title}:") for title in (*SECTIONS, "Global options")]
    assert places == sorted(places)
    for name, entry in ENTRIES.items():
        assert f"  {name:<10}  {entry.summary}" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_has_help(bare: Casbackup, name: str) -> None:
    text = bare.ok(name, "--help").text
    assert text.startswith(f"Usage: casbackup {name}")
    assert "Global options:" in text and "--json" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(bare: Casbackup, shell: str) -> None:
    script = bare.ok("completion", shell).text
    assert "_CASBACKUP_COMPLETE" in script
    assert bare.json("completion", shell)["script"].strip() == script.strip()


def test_the_bash_script_is_valid(bare: Casbackup) -> None:
    script = bare.ok("completion", "bash").out
    assert subprocess.run(["bash", "-n"], input=script).returncode == 0


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("casbackup re", {"restore", "repair"}),
        ("casbackup check --read", {"--read-data", "--read-data-subset"}),
        ("casbackup restore vm/", {"vm/100", "vm/200"}),
        ("casbackup backup vm/1", {"vm/100"}),
        ("casbackup completion f", {"fish"}),
        ("casbackup --profile l", {"local"}),
        ("casbackup sessions a", {"abort"}),
    ],
)
def test_completion(
    history: Casbackup, start: Callable[..., subprocess.Popen[bytes]], words: str, offered: set[str]
) -> None:
    config = history.folder / "config.toml"
    config.write_text("[profiles.local]\n[profiles.other]\n")
    environment = {
        "_CASBACKUP_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "CASBACKUP_CONFIG": str(config),
    }
    out, err = start(env=environment).communicate(timeout=60)
    assert err == b""
    assert {line.partition(",")[2] for line in out.decode().splitlines()} == offered


def test_completion_of_ids_and_failures(cb: Casbackup) -> None:
    from casbackup_client.app import App
    from casbackup_client.completion import references, vms

    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    identity = cb.json("show", "vm/100")["snapshot"]["id"]
    assert references(App(), identity[:2]) == [identity[:8]]
    assert references(App(), "") == ["vm/100"]
    nowhere = App({"CASBACKUP_REPOSITORY": "/nowhere"})
    assert vms(nowhere, "") == references(nowhere, "") == []


def test_the_generated_documentation_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
