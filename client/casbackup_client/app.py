"""What the global options ask for, and what commands get by it: the repository, a place for results, a
progress display.

Whence the repository: ``-r``, then ``--profile``, then ``CASBACKUP_REPOSITORY``, then the
``default-profile`` of the configuration file. A namespace comes from ``--namespace``, then ``--profile``,
then ``CASBACKUP_NAMESPACE``, then the default profile if that is in use. The file is only read when its
profiles matter: a backup whose repository is named otherwise does not wait for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from casbackup.errors import NeedsFolder, UsageError
from casbackup_client.output import Output, is_terminal
from casbackup_client.signals import LEAVING_S, told_of_signals

if TYPE_CHECKING:
    from casbackup.ids import Namespace
    from casbackup.peer.api import Peer, StoredPeer
    from casbackup.peer.http.rest import RestClient
    from casbackup.progress import Progress
    from casbackup.repository.repository import Repository
    from casbackup_client.config_file import Profile
    from casbackup_client.keys import Keys

ENVIRONMENT = {
    "CASBACKUP_REPOSITORY": "The repository, if neither -r nor --profile names one.",
    "CASBACKUP_NAMESPACE": "The namespace, if neither --namespace nor --profile names one.",
    "CASBACKUP_TOKEN": "The token for a repository on a server.",
    "CASBACKUP_TOKEN_FILE": "A file with the token in its first line.",
    "CASBACKUP_TOKEN_COMMAND": "A command, split as a shell does, that prints the token.",
    "CASBACKUP_KEY": "The fingerprint of the key that the repository must have; any other, or none, is refused.",
    "CASBACKUP_KEY_FOLDER": "Where keys are; default: ~/.config/casbackup/keys.",
    "CASBACKUP_PASSPHRASE": "The passphrase of the key.",
    "CASBACKUP_PASSPHRASE_FD": "The number of a file descriptor whose next line is the passphrase.",
    "CASBACKUP_PASSPHRASE_FILE": "A file with the passphrase in its first line.",
    "CASBACKUP_PASSPHRASE_COMMAND": "A command, split as a shell does, that prints the passphrase.",
    "CASBACKUP_NEW_PASSPHRASE": "For `key passwd`: the new passphrase; also with _FD, _FILE or _COMMAND.",
    "CASBACKUP_AGE_IDENTITY": "A file with an identity of age that opens the key; as --identity.",
    "CASBACKUP_CACERT": "A file of certificates (PEM) to trust besides the system's; as --cacert.",
    "CASBACKUP_PATIENCE": "How long to wait for a server that does not answer any more, such as 10m; default: 2m.",
    "CASBACKUP_CONFIG": "The configuration file, instead of the user's and the system's.",
    "CASBACKUP_DEBUG": "1: print a traceback with every error.",
    "XDG_STATE_HOME": "Below it is what was seen of encrypted repositories; default: ~/.local/state.",
    "XDG_RUNTIME_DIR": "Where backups of running VMs can be steered; default: /run for root, else /tmp.",
    "NO_COLOR": "If set and not empty: no colours on a terminal.",
    "TERM": "`dumb`: neither progress nor drawn tables.",
    "TZ": "The time zone in which retention rules count days; default: that of the machine.",
}
"""The variables that the command looks at, for the documentation."""


class KeyUse(Enum):
    """What a command wants of the key of the repository that it opens, if that is encrypted."""

    NONE = "none"
    """It works on what is stored."""
    IF_AT_HAND = "if at hand"
    """It shows more with it; nobody is asked for a passphrase."""
    NEEDED = "needed"


def is_address(repository: str) -> bool:
    """Is it on a server? (Told here so that a local command need not load what talks to servers.)"""
    return repository.startswith(("http://", "https://"))


def place_of(repository: str) -> str:
    """The one name of the place where it is: a real path, or an address in full.

    :raise UsageError: when it is no address.
    """
    if not is_address(repository):
        return os.path.realpath(repository)
    from casbackup.peer.http.address import parse_address

    return str(parse_address(repository))


class App:
    """One run of the command. The attributes are set by the global options, wherever they stand."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = os.environ if environment is None else environment
        self.repository_option: str | None = None
        self.profile_option: str | None = None
        self.namespace_option: str | None = None
        self.cacert_option: str | None = None
        self.identity_option: str | None = None
        self.json = False
        self.quiet = False
        self.verbose = False

    @cached_property
    def output(self) -> Output:
        return Output(json=self.json, quiet=self.quiet)

    @property
    def repository_path(self) -> str:
        """The path of its folder, or its address on a server.

        :raise UsageError: when nothing says which repository is meant.
        """
        path = self.repository_option or self._setting("repository", "CASBACKUP_REPOSITORY")
        if not path:
            raise UsageError(
                "no repository is named: give -r PATH or -r URL, set CASBACKUP_REPOSITORY, or use a profile"
            )
        return path

    @property
    def namespace(self) -> Namespace:
        """:raise InvalidName: when the name is none."""
        from casbackup.ids import DEFAULT_NAMESPACE, parse_namespace

        name = self.namespace_option or self._setting("namespace", "CASBACKUP_NAMESPACE")
        return parse_namespace(name) if name else DEFAULT_NAMESPACE

    @contextlib.contextmanager
    def repository(self, *, read_only: bool | None = None) -> Iterator[Repository]:
        """The open repository. ``read_only`` None: as its folder's rights allow."""
        from casbackup.repository.repository import Repository

        with Repository.open(self.folder_path, read_only=read_only) as repository:
            yield repository

    def require_folder(self, what: str) -> None:
        """:raise NeedsFolder: when the repository is on a server."""
        path = self.repository_path
        if is_address(path):
            raise NeedsFolder(f"{what} works on the repository's folder, and {path} is on a server")

    @property
    def folder_path(self) -> str:
        """The repository's path, for what works on its folder.

        :raise NeedsFolder: when the repository is on a server.
        """
        self.require_folder("this command")
        return self.repository_path

    @contextlib.contextmanager
    def peer(self, use: KeyUse = KeyUse.NEEDED, *, outlives_signals: bool = False) -> Iterator[Peer]:
        """The repository as jobs want it: in a folder, or on a server; with its key, as far as that is wanted.

        Once a signal came, a server is not waited for any more, unless there is much to do then.

        :raise EncryptionError: when the key is needed and cannot be had.
        """
        with self.stored_peer(outlives_signals=outlives_signals) as stored:
            if use is KeyUse.NONE:
                yield stored
                return
            from casbackup_client.keys import unlocked

            yield unlocked(stored, self.repository_path, self.keys, use, self.output.complain)

    @contextlib.contextmanager
    def stored_peer(self, *, outlives_signals: bool = False) -> Iterator[StoredPeer]:
        """The repository as it is stored; ``outlives_signals`` as in ``peer``."""
        path = self.repository_path
        if not is_address(path):
            from casbackup.peer.local import LocalPeer

            with self.repository() as repository:
                yield LocalPeer(repository)
            return
        from casbackup.peer.http.address import parse_address
        from casbackup.peer.http.peer import HttpPeer
        from casbackup_client.credentials import find_credentials, find_patience

        credentials = find_credentials(self._profile, self.environment, self.cacert_option)
        patience_s = find_patience(self._profile, self.environment)
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(HttpPeer(parse_address(path), credentials, patience_s=patience_s))
            if not outlives_signals:
                stack.enter_context(told_of_signals(lambda: peer.give_up(LEAVING_S)))
            yield peer

    @cached_property
    def keys(self) -> Keys:
        """The user's keys, with what the profile in use says of them."""
        from casbackup_client.keys import Keys

        return Keys(self.environment, self._profile, self.identity_option)

    @contextlib.contextmanager
    def server(self) -> Iterator[RestClient]:
        """The server that the repository is on.

        :raise UsageError: when it is in a folder.
        """
        from casbackup.peer.http.address import parse_address
        from casbackup.peer.http.rest import RestClient
        from casbackup_client.credentials import find_credentials, find_patience

        address = parse_address(self.repository_path)
        credentials = find_credentials(self._profile, self.environment, self.cacert_option)
        patience_s = find_patience(self._profile, self.environment)
        with RestClient(address, credentials, patience_s=patience_s) as client:
            yield client

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress display if somebody is there to see it."""
        if self.quiet or not is_terminal(2):
            from casbackup.progress import NoProgress

            yield NoProgress()
            return
        from casbackup_client.progress import TerminalProgress

        with TerminalProgress() as display:
            yield display

    def _setting(self, key: str, variable: str) -> str | None:
        """A setting from the profile and the environment: what the command line names comes first."""
        profile = self._profile
        in_profile: str | None = None if profile is None else getattr(profile, key)
        in_environment = self.environment.get(variable)
        return (in_profile or in_environment) if self.profile_option else (in_environment or in_profile)

    @cached_property
    def _profile(self) -> Profile | None:
        """The profile in use: the one named, or the default one when nothing else names a repository."""
        named = self.repository_option or self.environment.get("CASBACKUP_REPOSITORY")
        if self.profile_option is None and named:
            return None
        from casbackup_client.config_file import find_profile

        return find_profile(self.profile_option, self.environment)
