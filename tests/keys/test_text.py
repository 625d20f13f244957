"""Keys as text: whatever a person is likely to get wrong is noticed, and where."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.master_key import MasterKey
from casbackup.errors import KeyMistyped
from casbackup.keys.text import ALPHABET, GROUP_CHARACTERS, GROUPS, code_text, format_key, key_groups, parse_key

keys = st.binary(min_size=32, max_size=32).map(MasterKey)
places = st.tuples(st.integers(0, GROUPS - 1), st.integers(0, GROUP_CHARACTERS - 1))


def mistake(groups: list[str]) -> str:
    """The message that these groups, without a fingerprint, are refused with."""
    with pytest.raises(KeyMistyped) as raised:
        parse_key(" ".join(groups), "the sheet")
    return str(raised.value)


@given(keys)
def test_it_comes_back(key: MasterKey) -> None:
    text = format_key(key)
    typed = [text, text.lower(), text.replace("\n", "\r\n"), text.replace("0", "O").replace("1", "l")]
    typed += [code_text(key), f"The sheet\nof Jo\n{text}\n▀▄█", " ".join(key_groups(key)), "-".join(key_groups(key))]
    for variant in typed:
        assert parse_key(variant, "the sheet").reveal() == key.reveal()


@given(keys)
def test_what_a_code_holds_needs_little_room(key: MasterKey) -> None:
    assert re.fullmatch("[0-9A-Z $%*+./:-]{1,154}", code_text(key))  # alphanumeric mode, version 6 at level M


@given(keys, places, st.sampled_from(ALPHABET))
def test_each_wrong_character_is_noticed_in_its_group(key: MasterKey, place: tuple[int, int], wrong: str) -> None:
    groups = key_groups(key)
    group, index = place
    if groups[group][index] != wrong:
        groups[group] = groups[group][:index] + wrong + groups[group][index + 1 :]
        assert mistake(groups).startswith(f"group {group + 1} ")


@given(keys, places, st.characters())
def test_so_is_one_of_another_alphabet(key: MasterKey, place: tuple[int, int], wrong: str) -> None:
    groups = key_groups(key)
    group, index = place
    groups[group] = groups[group][:index] + wrong + groups[group][index + 1 :]
    try:
        assert parse_key(" ".join(groups), "the sheet").reveal() == key.reveal()  # it stood for the right one
    except KeyMistyped as error:
        assert str(error).startswith(f"group {group + 1} ")


@given(keys, places)
def test_a_lost_or_doubled_character_is_noticed_in_its_group(key: MasterKey, place: tuple[int, int]) -> None:
    group, index = place
    for count in (0, 2):
        groups = key_groups(key)
        groups[group] = groups[group][:index] + groups[group][index] * count + groups[group][index + 1 :]
        assert mistake(groups).startswith(f"group {group + 1} ")


@given(keys, st.integers(0, GROUPS - 1), st.integers(0, GROUP_CHARACTERS - 2))
def test_two_exchanged_characters_are_noticed(key: MasterKey, group: int, index: int) -> None:
    groups = key_groups(key)
    word = groups[group]
    groups[group] = word[:index] + word[index + 1] + word[index] + word[index + 2 :]
    if groups[group] != word:
        assert mistake(groups).startswith(f"group {group + 1} ")


@given(keys, st.integers(0, GROUPS - 1), st.integers(0, GROUPS - 1))
def test_groups_in_the_wrong_order_are_noticed(key: MasterKey, first: int, second: int) -> None:
    groups = key_groups(key)
    if first != second:
        groups[first], groups[second] = groups[second], groups[first]
        assert mistake(groups).startswith("group ")


@given(keys, st.integers(0, GROUPS - 1))
def test_a_group_left_out_or_typed_twice_is_noticed(key: MasterKey, group: int) -> None:
    groups = key_groups(key)
    mistake(groups[:group] + groups[group + 1 :])
    mistake(groups[: group + 1] + groups[group:])


@given(keys, st.integers(0, 31), st.sampled_from("0123456789abcdef"))
def test_a_wrong_digit_of_the_fingerprint_is_noticed(key: MasterKey, index: int, wrong: str) -> None:
    fingerprint = key.fingerprint
    if fingerprint[index] == wrong:
        return
    typed = f"fingerprint {fingerprint[:index]}{wrong}{fingerprint[index + 1 :]}\n" + " ".join(key_groups(key))
    with pytest.raises(KeyMistyped, match=key.fingerprint):
        parse_key(typed, "the sheet")


@given(keys, keys)
def test_no_message_quotes_a_group(key: MasterKey, other: MasterKey) -> None:
    """Eleven good groups in a log would be most of a key."""
    groups = key_groups(key)
    message = mistake([*groups[:12], key_groups(other)[5]])
    assert not [group for group in groups if group in message]


@given(st.text(alphabet=string.printable + "ß/İ٣", max_size=300))
def test_nothing_else_comes_of_any_text(text: str) -> None:
    try:
        parse_key(text, "the sheet")
    except KeyMistyped:
        return
    pytest.fail("not one in 2^60 texts is a key")
