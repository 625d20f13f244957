"""Whence the repository and the namespace, and what is wrong with a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from casbackup.errors import ConfigInvalid
from casbackup_client import config_file
from casbackup_client.app import App

from .conftest import Casbackup

GOOD = """
default-profile = "local"

[profiles.local]
repository = "repos/local"
namespace = "acme/prod"

[profiles.other]
repository = "/somewhere/else"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(GOOD)
    return path


def app(**environment: str) -> App:
    return App({name: value for name, value in environment.items() if value})


def test_the_default_profile(config: Path) -> None:
    made = app(CASBACKUP_CONFIG=str(config))
    assert made.repository_path == str(config.parent / "repos/local")
    assert made.namespace == "acme/prod"


def test_the_environment_comes_before_the_default_profile(config: Path) -> None:
    made = app(CASBACKUP_CONFIG=str(config), CASBACKUP_REPOSITORY="/mine", CASBACKUP_NAMESPACE="x")
    assert (made.repository_path, made.namespace) == ("/mine", "x")
    assert app(CASBACKUP_CONFIG=str(config), CASBACKUP_REPOSITORY="/mine").namespace == "default"


def test_the_command_line_comes_before_everything(config: Path) -> None:
    made = app(CASBACKUP_CONFIG=str(config), CASBACKUP_REPOSITORY="/mine", CASBACKUP_NAMESPACE="x")
    made.profile_option = "local"
    assert (made.repository_path, made.namespace) == (str(config.parent / "repos/local"), "acme/prod")
    made.repository_option, made.namespace_option = "/given", "y"
    assert (made.repository_path, made.namespace) == ("/given", "y")


def test_what_the_profile_does_not_say_comes_from_the_environment(config: Path) -> None:
    made = app(CASBACKUP_CONFIG=str(config), CASBACKUP_NAMESPACE="x")
    made.profile_option = "other"
    assert (made.repository_path, made.namespace) == ("/somewhere/else", "x")


def test_no_file_is_read_when_it_does_not_matter(tmp_path: Path) -> None:
    made = app(CASBACKUP_CONFIG=str(tmp_path / "missing"), CASBACKUP_REPOSITORY="/mine")
    assert (made.repository_path, made.namespace) == ("/mine", "default")


def test_profiles_on_the_command_line(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bare.folder / "no-config" / "casbackup"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[profiles.x]\nrepository = "{bare.folder}/x"\nnamespace = "n"\n')
    monkeypatch.delenv("CASBACKUP_REPOSITORY")
    bare.ok("--profile", "x", "init")
    snapshot = bare.json("backup", "vm/100", f"scsi0={bare.disk()}", "--profile", "x")["snapshot"]
    assert snapshot["namespace"] == "n"
    assert (bare.folder / "x" / "config.json").exists()
    assert bare.fails(2, "snapshots", "--profile", "y")["code"] == "config-invalid"
    assert bare.fails(2, "snapshots")["code"] == "usage"


def test_the_users_file_comes_before_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, system = tmp_path / "user.toml", tmp_path / "system.toml"
    system.write_text('default-profile = "b"\n[profiles.a]\nrepository = "/1"\n[profiles.b]\nrepository = "/2"\n')
    user.write_text('[profiles.a]\nrepository = "/3"\n')
    monkeypatch.setattr(config_file, "_user_file", lambda: str(user))

    def repository(name: str | None) -> str | None:
        profile = config_file.find_profile(name, {}, system_file=str(system))
        return None if profile is None else profile.repository

    assert (repository("a"), repository("b"), repository(None)) == ("/3", "/2", "/2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[profiles", "not understood"),
        ("\nrepo = 1", "line 2: unknown key 'repo'"),
        ("[profiles.a]\n[profiles.b]\nrepositorry = 'x'", "line 3: unknown key 'profiles.b.repositorry'"),
        (
            "[profiles.a]\nrepository = 'x'\n[profiles.b]\nrepository = 1",
            "line 4: profiles.b.repository must be text",
        ),
        ("[profiles.a]\nrepository = ''", "line 2: profiles.a.repository must be text"),
        ("profiles = 3", "line 1: profiles must be a table"),
        ("[profiles]\na = 3", "line 2: profiles.a must be a table"),
        ("[profiles.a]\nnamespace = 'a b'", "line 2: namespace 'a b' is not a valid name"),
        ("profiles = {a = {repo = 'x'}}", "line 1: unknown key 'profiles.a.repo'"),
        ("default-profile = 1", "line 1: default-profile must be text"),
        ("default-profile = 'nope'", "no profile 'nope'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match=said):
        config_file.find_profile(None, {"CASBACKUP_CONFIG": str(path)})


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="does not exist"):
        config_file.read_files({"CASBACKUP_CONFIG": str(tmp_path / "none")})
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        config_file.read_files({"CASBACKUP_CONFIG": str(tmp_path)})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigInvalid, match="not understood"):
        config_file.read_files({"CASBACKUP_CONFIG": str(tmp_path / "binary")})
