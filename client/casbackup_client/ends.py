"""The two ends of a command that works on two repositories: each a folder, an address, or a profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from casbackup.errors import UsageError
from casbackup_client.app import App, KeyUse, is_address, place_of
from casbackup_client.config_file import Profile
from casbackup_client.signals import LEAVING_S, told_of_signals

if TYPE_CHECKING:
    from casbackup.peer.api import Peer, StoredPeer

_PROFILE = "profile:"
_TOKEN = ("CASBACKUP_TOKEN", "CASBACKUP_TOKEN_FILE", "CASBACKUP_TOKEN_COMMAND")
_PASSPHRASE = (
    "CASBACKUP_PASSPHRASE",
    "CASBACKUP_PASSPHRASE_FD",
    "CASBACKUP_PASSPHRASE_FILE",
    "CASBACKUP_PASSPHRASE_COMMAND",
)


class End(NamedTuple):
    """``place``: a real path, or an address in full. ``profile``: if it was named by one."""

    place: str
    profile: Profile | None


def find_ends(app: App, source: str, destination: str) -> tuple[End, End]:
    """:raise UsageError: when both are the same repository. :raise ConfigInvalid: when there is no such profile."""
    ends = _found(app, source), _found(app, destination)
    if ends[0].place == ends[1].place:
        raise UsageError(f"both ends are the same repository, {ends[0].place}")
    return ends


@contextlib.contextmanager
def opened(app: App, end: End, use: KeyUse = KeyUse.NONE) -> Iterator[Peer]:
    """The repository there, with its key as far as that is wanted.

    :raise EncryptionError: when the key is needed and cannot be had.
    """
    with _stored(app, end) as stored:
        if use is KeyUse.NONE:
            yield stored
            return
        from casbackup_client.keys import Keys, unlocked

        keys = Keys(_environment(app, end.profile), end.profile, app.identity_option)
        yield unlocked(stored, end.place, keys, use, app.output.complain)


@contextlib.contextmanager
def _stored(app: App, end: End) -> Iterator[StoredPeer]:
    if not is_address(end.place):
        from casbackup.peer.local import LocalPeer
        from casbackup.repository.repository import Repository

        with Repository.open(end.place) as repository:
            yield LocalPeer(repository)
        return
    from casbackup.peer.http.address import parse_address
    from casbackup.peer.http.peer import HttpPeer
    from casbackup_client.credentials import find_credentials, find_patience

    credentials = find_credentials(end.profile, _environment(app, end.profile), app.cacert_option)
    patience_s = find_patience(end.profile, app.environment)
    with (
        HttpPeer(parse_address(end.place), credentials, patience_s=patience_s) as peer,
        told_of_signals(lambda: peer.give_up(LEAVING_S)),
    ):
        yield peer


def _found(app: App, text: str) -> End:
    profile: Profile | None = None
    if text.startswith(_PROFILE):
        from casbackup_client.config_file import find_profile

        name = text.removeprefix(_PROFILE)
        profile = find_profile(name, app.environment)
        if profile is None or not profile.repository:
            raise UsageError(f"profile {name!r} names no repository")
        text = profile.repository
    return End(place_of(text), profile)


def _environment(app: App, profile: Profile | None) -> Mapping[str, str]:
    """What a profile has of its own counts before what is in the environment, which may be the other end's."""
    if profile is None:
        return app.environment
    hidden = {
        *(_TOKEN if profile.token or profile.token_file or profile.token_command else ()),
        *(_PASSPHRASE if profile.passphrase_file or profile.passphrase_command else ()),
        *(("CASBACKUP_KEY",) if profile.key else ()),
        *(("CASBACKUP_AGE_IDENTITY",) if profile.identity else ()),
    }
    return {name: value for name, value in app.environment.items() if name not in hidden}
