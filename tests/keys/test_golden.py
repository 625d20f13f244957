"""Files of earlier versions stay readable. The fixtures are never edited; a new version adds its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.keys.age import parse_identities
from casbackup.keys.text import parse_key
from casbackup.keys.wrapping import unwrap
from casbackup.spec.keyfile import AgeWrapping, PassphraseWrapping, PlainWrapping, decode_key_file

FIXTURES = Path(__file__).parent / "fixtures"
SECRET = bytes(range(32))


@pytest.mark.parametrize("kind", [PassphraseWrapping, AgeWrapping, PlainWrapping])
def test_each_way_into_a_key_file(kind: type) -> None:
    key_file = decode_key_file((FIXTURES / "key-1.json").read_bytes(), "key-1.json")
    alone = replace(key_file, wrappings=tuple(w for w in key_file.wrappings if isinstance(w, kind)))
    identities = parse_identities((FIXTURES / "identity-1.txt").read_bytes(), "identity-1.txt")
    assert unwrap(alone, "key-1.json", identities=identities, passphrases=["Grüße".encode()]).reveal() == SECRET


def test_a_sheet() -> None:
    assert parse_key((FIXTURES / "sheet-1.txt").read_text(encoding="utf-8"), "the sheet").reveal() == SECRET
