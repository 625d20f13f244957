"""``casbackup version`` and ``casbackup completion``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup_client.app import App
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from casbackup_client.documents import CompletionDocument, VersionDocument


@command("version")
@pass_app
def version(app: App) -> None:
    """Show the version of casbackup and of the repository format that it writes."""
    import platform

    from casbackup import __version__
    from casbackup.spec.config import FORMAT, OLDEST_FORMAT

    document: VersionDocument = {
        "version": __version__,
        "repository_format": FORMAT,
        "oldest_repository_format": OLDEST_FORMAT,
        "python": platform.python_version(),
    }
    app.output.result(
        document,
        lambda: [f"casbackup {__version__}, repository format {FORMAT}, Python {platform.python_version()}"],
    )


_SHELLS = ("bash", "zsh", "fish")


@command("completion")
@click.argument("shell", metavar=f"[{'|'.join(_SHELLS)}]", type=click.Choice(_SHELLS))
@pass_app
def completion(app: App, shell: str) -> None:
    """Print a shell's completion script.

    \b
    bash: casbackup completion bash > ~/.local/share/bash-completion/completions/casbackup
    zsh:  casbackup completion zsh > FOLDER-OF-FPATH/_casbackup
    fish: casbackup completion fish > ~/.config/fish/completions/casbackup.fish
    """
    from click.shell_completion import get_completion_class

    from casbackup_client.cli import COMPLETION_VARIABLE, cli

    found = get_completion_class(shell)
    assert found is not None
    maker = found(cli, {}, "casbackup", COMPLETION_VARIABLE)
    # Not ``source()``: that runs bash to look at its version.
    script = maker.source_template % maker.source_vars()
    document: CompletionDocument = {"shell": shell, "script": script}
    app.output.result(document, lambda: [script.rstrip("\n")])
