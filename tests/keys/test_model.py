"""Whatever is done to a key file, in whatever order: the ways that it should have lead to the key, and no others do."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from casbackup.codec.crypto import Argon2Cost
from casbackup.codec.master_key import MasterKey
from casbackup.errors import EncryptionError, UsageError
from casbackup.keys import making
from casbackup.keys.wrapping import unwrap, wrap_by_passphrase
from casbackup.spec.keyfile import KeyFile, decode_key_file, encode_key_file

PASSPHRASES = (b"one", b"two")
passphrases = st.sampled_from(PASSPHRASES)
people = st.integers(0, 2)


def _pairs() -> list[tuple[Any, str]]:
    import pyrage

    identities = [pyrage.x25519.Identity.generate() for _ in range(3)]
    return [(identity, str(identity.to_public())) for identity in identities]


class KeyFiles(RuleBasedStateMachine):
    """A key file, and beside it what should open it."""

    pairs = _pairs()

    @initialize(passphrase=passphrases)
    def create(self, passphrase: bytes) -> None:
        self.key = MasterKey.generate()
        self.key_file = making.key_file_of(self.key, passphrase=passphrase)
        self.passphrase: bytes | None = passphrase
        self.plain = False
        self.people: set[int] = set()

    @rule(passphrase=st.none() | passphrases)
    def passwd(self, passphrase: bytes | None) -> None:
        self.key_file = making.with_passphrase(self.key_file, self.key, passphrase)
        self.passphrase, self.plain = passphrase, passphrase is None

    @rule(added=st.sets(people, min_size=1))
    def add(self, added: set[int]) -> None:
        self.key_file = making.with_recipients(self.key_file, self.key, [self.pairs[n][1] for n in added])
        self.people |= added

    @rule(person=people)
    def remove(self, person: int) -> None:
        last = self.people == {person} and self.passphrase is None and not self.plain
        if person not in self.people or last:
            with pytest.raises(UsageError):
                making.without_recipients(self.key_file, [self.pairs[person][1]])
            return
        self.key_file = making.without_recipients(self.key_file, [self.pairs[person][1]])
        self.people.remove(person)

    @precondition(lambda self: self.plain)
    @rule()
    def give_away(self) -> None:
        if not self.people:
            with pytest.raises(UsageError):
                making.without_plain(self.key_file)
            return
        self.key_file = making.without_plain(self.key_file)
        self.plain = False

    @invariant()
    def opens_for_whom_it_should(self) -> None:
        kept = decode_key_file(encode_key_file(self.key_file), "the file")
        assert kept == self.key_file and kept.fingerprint == self.key.fingerprint
        assert self._opens(kept) is self.plain
        for passphrase in PASSPHRASES:
            assert self._opens(kept, passphrases=[passphrase]) is (self.plain or passphrase == self.passphrase)
        for number, (identity, _) in enumerate(self.pairs):
            assert self._opens(kept, identities=[identity]) is (self.plain or number in self.people)

    def _opens(self, key_file: KeyFile, **ways: Any) -> bool:
        try:
            return unwrap(key_file, "the file", **ways).reveal() == self.key.reveal()
        except EncryptionError:
            return False


def test_key_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(making, "wrap_by_passphrase", partial(wrap_by_passphrase, cost=Argon2Cost(1, 64, 1)))
    run_state_machine_as_test(KeyFiles, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))
