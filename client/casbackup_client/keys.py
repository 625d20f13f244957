"""How a command gets the key of an encrypted repository.

The key file is looked for in the key folder, then in the repository itself. A copy in the repository is only as
trustworthy as whoever keeps the repository: they cannot know the passphrase, so one that it opens is the user's; but
anybody can wrap a key of their own for a recipient. So a copy is opened by an identity only when the user has said
which key is wanted (``CASBACKUP_KEY``, or ``key`` of the profile) or imports it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from casbackup.errors import EncryptionError, KeyMismatch, KeyMissing, PassphraseNeeded, UsageError
from casbackup_client.app import KeyUse, place_of
from casbackup_client.passphrases import NEW_VARIABLE, VARIABLE, Configured, Passphrases

if TYPE_CHECKING:
    from casbackup.codec.master_key import MasterKey
    from casbackup.keys.ring import KeyRing
    from casbackup.peer.api import Peer, StoredPeer
    from casbackup.peer.seen import SeenFolder
    from casbackup.repository.repository import Repository
    from casbackup.spec.config import RepositoryConfig
    from casbackup.spec.keyfile import KeyFile
    from casbackup_client.config_file import Profile

COPY = "the repository's copy of its key"


class Keys:
    """The user's keys, and what opens them."""

    def __init__(
        self, environment: Mapping[str, str], profile: Profile | None = None, identity_path: str | None = None
    ) -> None:
        self.passphrases = Passphrases(environment, VARIABLE, _configured(profile))
        self.new_passphrases = Passphrases(environment, NEW_VARIABLE)
        self._identity_path = identity_path or environment.get("CASBACKUP_AGE_IDENTITY") or _of(profile, "identity")
        self._folder = environment.get("CASBACKUP_KEY_FOLDER")
        self._wanted = environment.get("CASBACKUP_KEY") or _of(profile, "key")

    @cached_property
    def ring(self) -> KeyRing:
        from casbackup.keys.ring import KeyRing

        return KeyRing(self._folder or default_folder())

    @property
    def wanted(self) -> str | None:
        """The fingerprint of the key that the user says is the right one, if they do.

        :raise UsageError: when what was said begins those of several keys.
        """
        if self._wanted is None:
            return None
        return full_fingerprint(self.ring, self._wanted)

    def named(self, text: str | None) -> KeyFile:
        """The file of a key of the key folder: the one that begins so, or the one wanted, or the only one.

        :raise KeyMissing, KeyExposed, KeyFileDamaged: when there is none of use. :raise UsageError: when several are.
        """
        return self.ring.read(self.ring.find(text) if text else self.wanted or self.ring.only())

    def copy_for_repository(self, fingerprint: str) -> bytes:
        """A key file without the key as it is, for those to see who have the repository.

        :raise KeyMissing, KeyExposed, KeyFileDamaged: when there is none of use. :raise UsageError: when nothing
        protects the key.
        """
        from casbackup.keys.making import without_plain
        from casbackup.spec.keyfile import encode_key_file

        return encode_key_file(without_plain(self.ring.read(fingerprint)))

    def identities(self) -> list[Any]:
        """Of age; none, when no file is named.

        :raise UsageError: when it cannot be read or holds none.
        """
        if not self._identity_path:
            return []
        from casbackup.keys.age import parse_identities

        try:
            with open(self._identity_path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UsageError(f"the identity file {self._identity_path} cannot be read: {error.strerror}") from error
        return parse_identities(data, self._identity_path)

    def unlock(
        self, key_file: KeyFile, origin: str | None = None, *, ask: bool = True, by_identity: bool = True
    ) -> MasterKey:
        """The key in a key file. ``origin`` names it in errors; None: it is in the key folder.

        :raise PassphraseNeeded, PassphraseWrong, KeyFileDamaged: as ``unwrap`` does.
        """
        from casbackup.keys.memory import keep_out_of_dumps
        from casbackup.keys.wrapping import unwrap

        keep_out_of_dumps()
        return unwrap(
            key_file,
            origin or self.ring.path(key_file.fingerprint),
            identities=self.identities() if by_identity else (),
            passphrases=self.passphrases.existing(f"key {key_file.fingerprint}", ask=ask),
        )

    def of_repository(self, peer: StoredPeer, *, at_hand: bool = False) -> MasterKey:
        """The key of an encrypted repository. ``at_hand``: only if it is in the key folder, and opens without asking.

        :raise KeyMissing: when it is neither in the key folder nor in the repository. Else as ``unlock``.
        """
        fingerprint = peer.config.key_fingerprint
        if at_hand or os.path.lexists(self.ring.path(fingerprint)):
            return self.unlock(self.ring.read(fingerprint), ask=not at_hand)
        data = peer.stored_key()
        if data is None:
            raise KeyMissing(
                f"the repository is encrypted with key {fingerprint}, which is neither in {self.ring.folder} nor in it"
            )
        from casbackup.repository.stored_key import storable

        return self._of_copy(storable(data, COPY, peer.config))

    def _of_copy(self, key_file: KeyFile) -> MasterKey:
        trusted = self.wanted is not None
        try:
            return self.unlock(key_file, COPY, by_identity=trusted)
        except PassphraseNeeded as error:
            if trusted or not self._identity_path or not key_file.recipients:
                raise
            raise KeyMissing(
                f"key {key_file.fingerprint} is not in {self.ring.folder}, and {COPY} is opened by an identity only if "
                "CASBACKUP_KEY or the profile says that this is the right key; or import it"
            ) from error

    def check(self, config: RepositoryConfig) -> None:
        """:raise KeyMismatch: when the repository does not have the key that the user says is the right one."""
        wanted = self.wanted
        if wanted is not None and wanted != config.key_fingerprint:
            found = f"is encrypted with key {config.key_fingerprint}" if config.encrypted else "is not encrypted"
            raise KeyMismatch(f"the repository {found}; key {wanted} is wanted")


def unlocked(stored: StoredPeer, place: str, keys: Keys, use: KeyUse, warn: Callable[[str], None]) -> Peer:
    """The repository as its owner sees it, as far as ``use`` asks for that; what is not encrypted, as it is.

    ``place``: where it is. Which key it had there is remembered: whoever keeps the repository could say that it is not
    encrypted, and be sent everything to read with the next backup. ``warn`` hears of what looks like a repository that
    was put back to an older state.

    :raise EncryptionError: when the key is needed and cannot be had, or is not the one that the user wants.
    """
    if use is KeyUse.NONE:
        return stored
    from casbackup.peer.seen import SeenFolder

    keys.check(stored.config)
    seen = SeenFolder(_seen_folder())
    if keys.wanted is None:
        _require_same_key(seen, place_of(place), stored.config)
    if not stored.config.encrypted:
        return stored
    try:
        key = keys.of_repository(stored, at_hand=use is KeyUse.IF_AT_HAND)
    except EncryptionError:
        if use is KeyUse.NEEDED:
            raise
        return stored
    from casbackup.peer.sealed import SealedPeer

    opened = SealedPeer(stored, key, seen, warn)
    seen.note_key_at(place_of(place), key.fingerprint)
    return opened


def unlock_if_at_hand(repository: Repository, keys: Keys) -> None:
    """Let what is sealed in a repository in a folder be verified with the key, if it is at hand; nobody is asked.

    :raise KeyMismatch: when the user wants another key.
    """
    keys.check(repository.config)
    if not repository.config.encrypted:
        return
    from casbackup.peer.local import LocalPeer

    with contextlib.suppress(EncryptionError):
        repository.unlock(keys.of_repository(LocalPeer(repository), at_hand=True))


def note_new(place: str, fingerprint: str) -> None:
    """A repository was made there; ``fingerprint`` of its key is empty if it is not encrypted."""
    from casbackup.peer.seen import SeenFolder

    SeenFolder(_seen_folder()).note_key_at(place_of(place), fingerprint or None)


def _require_same_key(seen: SeenFolder, place: str, config: RepositoryConfig) -> None:
    """:raise KeyMismatch: when the repository at that place had another key when it was opened last."""
    before = seen.key_at(place)
    if before is not None and before != config.key_fingerprint:
        found = f"key {config.key_fingerprint}" if config.encrypted else "no key"
        raise KeyMismatch(
            f"{place} had key {before} when it was opened here last, and has {found} now; "
            f"if you have replaced it yourself, remove it from {seen.places}"
        )


def default_folder() -> str:
    import platformdirs

    return os.path.join(platformdirs.user_config_dir("casbackup", appauthor=False), "keys")


def _seen_folder() -> str:
    """Where platformdirs has it; commands on plain repositories look there, too, and need not wait for that."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "casbackup", "seen")


def full_fingerprint(ring: KeyRing, text: str) -> str:
    """A fingerprint in full as it is, also of a key that is not here; a shorter one as in the key folder.

    :raise KeyMissing: when there is none that begins so. :raise UsageError: when there are several.
    """
    from casbackup.spec.keyfile import is_fingerprint

    compact = "".join(text.split()).lower()
    return compact if is_fingerprint(compact) else ring.find(compact)


def _configured(profile: Profile | None) -> Configured:
    return Configured(_of(profile, "passphrase_file"), _of(profile, "passphrase_command"))


def _of(profile: Profile | None, name: str) -> str | None:
    return None if profile is None else getattr(profile, name)
