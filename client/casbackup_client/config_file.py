"""The user's configuration file: profiles, so that ``--profile NAME`` stands for a repository and what goes
with it.

    default-profile = "local"

    [profiles.local]
    repository = "/backup/vms"
    namespace = "acme/prod"

    [profiles.remote]
    repository = "https://backup.example.com:8007/main"
    token-file = "~/.config/casbackup/token"

It is ``$CASBACKUP_CONFIG`` if that is set, otherwise ``config.toml`` in the user's configuration folder
(``~/.config/casbackup``), whose profiles come before those of ``/etc/casbackup/config.toml``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from casbackup.errors import CasbackupError, ConfigInvalid
from casbackup.ids import parse_namespace
from casbackup.units import parse_duration

SYSTEM_FILE = "/etc/casbackup/config.toml"

_TOP_KEYS = ("default-profile", "profiles")


class Profile(NamedTuple):
    """What a profile stands for; the fields are its keys in the file."""

    repository: str | None = None
    namespace: str | None = None
    token: str | None = None
    token_file: str | None = None
    token_command: str | None = None
    cacert: str | None = None
    key: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    identity: str | None = None
    patience: str | None = None

    def __repr__(self) -> str:
        return f"Profile(repository={self.repository!r})"


PROFILE_KEYS = tuple(name.replace("_", "-") for name in Profile._fields)


class ConfigFile(NamedTuple):
    """One file's content."""

    path: str
    default_profile: str | None
    profiles: Mapping[str, Profile]


def find_profile(name: str | None, environment: Mapping[str, str], *, system_file: str = SYSTEM_FILE) -> Profile | None:
    """The profile of that name; without one, the default profile, or None if there is none.

    :raise ConfigInvalid: when a file is wrong, or lacks the profile.
    """
    files = read_files(environment, system_file=system_file)
    wanted = name or next((file.default_profile for file in files if file.default_profile), None)
    if wanted is None:
        return None
    for file in files:
        if wanted in file.profiles:
            return file.profiles[wanted]
    known = ", ".join(sorted({profile for file in files for profile in file.profiles})) or "none"
    raise ConfigInvalid(f"there is no profile {wanted!r}; there is: {known}")


def read_files(environment: Mapping[str, str], *, system_file: str = SYSTEM_FILE) -> list[ConfigFile]:
    """The files that count, the most important one first.

    :raise ConfigInvalid: when one is wrong, or the one named by CASBACKUP_CONFIG is missing.
    """
    named = environment.get("CASBACKUP_CONFIG")
    if named:
        if not os.path.exists(named):
            raise ConfigInvalid(f"{named}, which CASBACKUP_CONFIG names, does not exist")
        return [read_file(named)]
    return [read_file(path) for path in (_user_file(), system_file) if os.path.exists(path)]


def read_file(path: str) -> ConfigFile:
    """:raise ConfigInvalid: when it cannot be read, is not TOML, or holds what it should not."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} is not understood: {error}") from error
    _Checker(path, text).check_keys(content, _TOP_KEYS, ())
    return _checked(content, _Checker(path, text))


def _user_file() -> str:
    import platformdirs

    return os.path.join(platformdirs.user_config_dir("casbackup", appauthor=False), "config.toml")


class _Checker:
    """Checks keys and values, and says where in the file the wrong ones are."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self._lines = text.splitlines()

    def check_keys(self, table: Mapping[str, Any], known: Sequence[str], place: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                name = ".".join((*place, key))
                raise self.wrong(key, place, f"unknown key {name!r}; known here are {', '.join(known)}")

    def text(self, table: Mapping[str, Any], key: str, place: tuple[str, ...]) -> str | None:
        value = table.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.wrong(key, place, f"{'.'.join((*place, key))} must be text")
        return value

    def table(self, value: object, key: str, place: tuple[str, ...]) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, place, f"{'.'.join((*place, key))} must be a table")
        return value

    def wrong(self, key: str, place: tuple[str, ...], what: str) -> ConfigInvalid:
        line = self._line_of(key, place)
        return ConfigInvalid(f"{self.path}{'' if line is None else f', line {line}'}: {what}")

    def _line_of(self, key: str, place: tuple[str, ...]) -> int | None:
        """The parser keeps no lines: look for the key as people write it, below its table's header if that
        is found.
        """
        header = (
            re.compile(r"\s*\[\s*" + r"\s*\.\s*".join(_quoted(part) for part in place) + r"\s*\]") if place else None
        )
        assignment = re.compile(rf"(\s*|.*[.{{,]\s*){_quoted(key)}\s*[=.]|\s*\[.*{_quoted(key)}\s*\]")
        start = next((n for n, line in enumerate(self._lines) if header and header.match(line)), 0)
        return next((n + 1 for n, line in enumerate(self._lines[start:], start) if assignment.match(line)), None)


def _quoted(key: str) -> str:
    return rf"""["']?{re.escape(key)}["']?"""


def _checked(content: Mapping[str, Any], checker: _Checker) -> ConfigFile:
    profiles = checker.table(content.get("profiles", {}), "profiles", ())
    return ConfigFile(
        checker.path,
        checker.text(content, "default-profile", ()),
        {name: _profile(checker, name, checker.table(table, name, ("profiles",))) for name, table in profiles.items()},
    )


def _profile(checker: _Checker, name: str, table: Mapping[str, Any]) -> Profile:
    place = ("profiles", name)
    checker.check_keys(table, PROFILE_KEYS, place)
    repository = checker.text(table, "repository", place)
    namespace = checker.text(table, "namespace", place)
    if namespace is not None:
        try:
            parse_namespace(namespace)
        except CasbackupError as error:
            raise checker.wrong("namespace", place, str(error)) from error
    return Profile(
        _path(checker, repository),
        namespace,
        checker.text(table, "token", place),
        _path(checker, checker.text(table, "token-file", place)),
        checker.text(table, "token-command", place),
        _path(checker, checker.text(table, "cacert", place)),
        checker.text(table, "key", place),
        _path(checker, checker.text(table, "passphrase-file", place)),
        checker.text(table, "passphrase-command", place),
        _path(checker, checker.text(table, "identity", place)),
        _duration(checker, checker.text(table, "patience", place), place),
    )


def _duration(checker: _Checker, text: str | None, place: tuple[str, ...]) -> str | None:
    if text is not None:
        try:
            parse_duration(text)
        except CasbackupError as error:
            raise checker.wrong("patience", place, str(error)) from error
    return text


def _path(checker: _Checker, text: str | None) -> str | None:
    """A path of the file, from the file's folder on; the address of a server as it is."""
    if text is None or text.startswith(("http://", "https://")):
        return text
    return os.path.join(os.path.dirname(os.path.abspath(checker.path)), os.path.expanduser(text))
