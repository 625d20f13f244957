"""Encrypted repositories on the command line: making and keeping keys, and what is told to whom."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from casbackup.codec.crypto import Argon2Cost
from casbackup.codec.master_key import MasterKey
from casbackup.keys import making
from casbackup.keys.text import key_groups, parse_key
from casbackup_client import documents
from casbackup_client.cli import SECTIONS, cli

from .conftest import START, Casbackup
from .test_documents import conforms

Start = Callable[..., "subprocess.Popen[bytes]"]
AGE = shutil.which("age-keygen")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The key folder. Within this process passphrases are cheap to try."""
    cheap = functools.partial(making.wrap_by_passphrase, cost=Argon2Cost(1, 64, 1))
    monkeypatch.setattr(making, "wrap_by_passphrase", cheap)
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def enc(bare: Casbackup) -> Casbackup:
    """The command, and an encrypted repository with a snapshot, whose key is not wrapped."""
    bare.ok("init", "--encrypted", "--no-passphrase", "-q")
    bare.ok("backup", "vm/100", f"scsi0={bare.disk()}", "--notes", "mine", "-q")
    return bare


@pytest.fixture
def wrapped(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> Casbackup:
    """The same with a key that ``secret`` opens, and no source for it."""
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "secret")
    bare.ok("init", "--encrypted", "-q")
    bare.ok("backup", "vm/100", f"scsi0={bare.disk()}", "-q")
    monkeypatch.delenv("CASBACKUP_PASSPHRASE")
    return bare


def fingerprint(cb: Casbackup) -> str:
    found: str = cb.json("key", "show")["key"]["fingerprint"]
    return found


def key_of(cb: Casbackup) -> MasterKey:
    """Of one that opens without being asked for."""
    return parse_key(cb.ok("key", "export", "--plain").text, "the export")


def state_of(repository: Path) -> dict[str, str]:
    """A hash of each file but the index, which LMDB touches when it is opened."""
    files = [path for path in repository.rglob("*") if path.is_file() and "index" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- what needs the key, and what does not


def test_with_the_key_all_is_as_ever(enc: Casbackup) -> None:
    out = enc.folder / "out"
    enc.ok("restore", "vm/100", "--to", out, "-q")
    assert (out / "scsi0.raw").read_bytes() == enc.disk().read_bytes()
    assert enc.json("show", "vm/100")["snapshot"]["notes"] == "mine"
    enc.ok("label", "vm/100", "--notes", "other", "-q")
    assert enc.json("snapshots")["snapshots"][0]["notes"] == "other"
    enc.ok("diff", "vm/100", "vm/100")
    enc.ok("export", "vm/100", enc.folder / "x.vma")
    assert enc.json("backup", "vm/100", f"scsi0={enc.disk()}")["snapshot"]["stats"]["new_bytes"] == 0


@pytest.mark.parametrize(
    "command",
    [
        "snapshots",
        "show vm/100",
        "stats",
        "check --read-data",
        "gc",
        "pin vm/100",
        "forget vm/100 --all -n",
        "sessions",
    ],
)
def test_what_works_without_the_key(enc: Casbackup, folder: Path, command: str) -> None:
    folder.rename(folder.with_name("elsewhere"))
    result = enc.ok(*command.split())
    assert "mine" not in result.text


@pytest.mark.parametrize(
    "command",
    [
        "backup vm/100 scsi0=vm.raw",
        "restore vm/100 --to out",
        "dump vm/100 scsi0 -o dumped",
        "diff vm/100 vm/100",
        "export vm/100 x.vma",
        "label vm/100 --notes x",
        "nbd-serve vm/100",
    ],
)
def test_what_needs_the_key_names_it(
    enc: Casbackup, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = fingerprint(enc)
    folder.rename(folder.with_name("elsewhere"))
    monkeypatch.chdir(enc.folder)
    before = state_of(enc.repository)
    error = enc.fails(12, *command.split())
    assert error["code"] == "key-missing" and needed in error["message"]
    assert state_of(enc.repository) == before


def test_sync_needs_no_key(enc: Casbackup, folder: Path) -> None:
    other = enc.folder / "other"
    enc.ok("init", "-r", other, "--encrypted", "--key", fingerprint(enc), "-q")
    folder.rename(folder.with_name("elsewhere"))
    enc.ok("sync", enc.repository, other, "-q")
    folder.with_name("elsewhere").rename(folder)
    enc.ok("restore", "-r", other, "vm/100", "--to", enc.folder / "out", "-q")
    assert (enc.folder / "out" / "scsi0.raw").read_bytes() == enc.disk().read_bytes()


# --- init


def test_init_says_what_to_do_about_the_key(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "secret")
    text = bare.ok("init", "--encrypted", "--comment", "of Jo").text
    shown = bare.json("key", "show")["key"]
    assert shown["fingerprint"] in text and "Keep a copy" in text and "key paper" in text
    assert shown["comment"] == "of Jo" and not shown["plain"] and len(shown["passphrases"]) == 1
    config = json.loads((bare.repository / "config.json").read_text())
    assert config["key_fingerprint"] == shown["fingerprint"]


def test_init_with_a_key_that_is_elsewhere(bare: Casbackup, folder: Path) -> None:
    """As on a server, whose administrator is told the fingerprint and no more."""
    document = bare.json("init", "--encrypted", "--key", "0123" * 8)
    assert document["repository"]["key"] == "0123" * 8 and "new_key" not in document
    assert not folder.exists()


def test_init_with_the_key_that_is_wanted(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bare.json("key", "create", "--no-passphrase")["key"]["fingerprint"]
    bare.ok("key", "create", "--no-passphrase", "-q")
    monkeypatch.setenv("CASBACKUP_KEY", made[:8])
    assert bare.json("init", "--encrypted")["repository"]["key"] == made
    assert len(bare.json("key", "list")["keys"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        "--key 0123",
        "--store-key",
        "--comment x",
        "--no-passphrase",
        "--encrypted --key 01230123012301230123012301230123 --no-passphrase",
        "--encrypted --no-passphrase --store-key",
        "--encrypted --recipient age1nobody",
    ],
)
def test_what_init_refuses(bare: Casbackup, folder: Path, options: str) -> None:
    bare.fails(2, "init", *options.split())
    assert not bare.repository.exists() and not folder.exists()


def test_an_init_that_cannot_be_makes_no_key(enc: Casbackup) -> None:
    for path in (enc.repository, enc.folder):
        error = enc.fails(1, "init", "-r", path, "--encrypted", "--no-passphrase")
        assert error["code"] == "repository-exists"
    assert len(enc.json("key", "list")["keys"]) == 1


def test_without_a_passphrase_there_is_no_repository(bare: Casbackup, folder: Path, start: Start) -> None:
    process = start("init", "--encrypted", stdin=subprocess.DEVNULL, start_new_session=True)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 12 and "needs a passphrase" in err
    assert not bare.repository.exists() and not folder.exists()


# --- passphrases


def source(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, passphrase: str) -> None:
    """Set a source of the passphrase; ``profile-...``: in a profile of the configuration file."""
    path = folder / "passphrase"
    path.write_text(f"{passphrase}\nanother line\n")
    if kind == "environment":
        monkeypatch.setenv("CASBACKUP_PASSPHRASE", passphrase)
    elif kind == "descriptor":
        monkeypatch.setenv("CASBACKUP_PASSPHRASE_FD", str(os.open(path, os.O_RDONLY)))
    elif kind == "file":
        monkeypatch.setenv("CASBACKUP_PASSPHRASE_FILE", str(path))
    elif kind == "command":
        monkeypatch.setenv("CASBACKUP_PASSPHRASE_COMMAND", f"cat '{path}'")
    else:
        key, value = {"profile-file": ("file", "passphrase"), "profile-command": ("command", f"cat {path}")}[kind]
        config = folder / "config.toml"
        config.write_text(
            f'default-profile = "x"\n[profiles.x]\nrepository = "repository"\npassphrase-{key} = "{value}"\n'
        )
        monkeypatch.setenv("CASBACKUP_CONFIG", str(config))
        monkeypatch.delenv("CASBACKUP_REPOSITORY")


KINDS = ["environment", "descriptor", "file", "command", "profile-file", "profile-command"]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_of_a_passphrase(wrapped: Casbackup, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source(kind, wrapped.folder, monkeypatch, "secret")
    assert wrapped.ok("dump", "vm/100", "scsi0", "--length", 4096).out == wrapped.disk().read_bytes()[:4096]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debug", ["", "1"])
def test_a_wrong_passphrase_is_not_quoted(
    wrapped: Casbackup, monkeypatch: pytest.MonkeyPatch, kind: str, debug: str
) -> None:
    monkeypatch.setenv("CASBACKUP_DEBUG", debug)
    needed = fingerprint(wrapped)
    source(kind, wrapped.folder, monkeypatch, "xyzzy")
    result = wrapped("dump", "vm/100", "scsi0", "-v")
    assert result.status == 12 and needed in result.err
    assert "xyzzy" not in result.err + result.text


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("CASBACKUP_PASSPHRASE", "", 2),
        ("CASBACKUP_PASSPHRASE", "x" * 2000, 2),
        ("CASBACKUP_PASSPHRASE_FILE", "/nowhere", 2),
        ("CASBACKUP_PASSPHRASE_FILE", "/dev/null", 2),
        ("CASBACKUP_PASSPHRASE_FD", "77", 2),
        ("CASBACKUP_PASSPHRASE_FD", "xyzzy", 2),
        ("CASBACKUP_PASSPHRASE_COMMAND", "false xyzzy", 2),
        ("CASBACKUP_PASSPHRASE_COMMAND", "'xyzzy", 2),
        ("CASBACKUP_PASSPHRASE_COMMAND", "/nowhere/xyzzy", 2),
        ("CASBACKUP_PASSPHRASE_COMMAND", "true", 2),
        ("CASBACKUP_AGE_IDENTITY", "/nowhere", 2),
        ("CASBACKUP_KEY", "zz", 12),
    ],
)
def test_sources_that_are_none(
    wrapped: Casbackup, monkeypatch: pytest.MonkeyPatch, name: str, value: str, status: int
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("CASBACKUP_DEBUG", "1")
    result = wrapped("dump", "vm/100", "scsi0")
    assert result.status == status
    assert "COMMAND" not in name or "xyzzy" not in result.err


def test_a_command_for_the_passphrase_gets_nothing_of_the_disk(
    wrapped: Casbackup, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = wrapped.folder / "passphrase"
    script.write_text("#!/bin/sh\nhead -c 4096 >/dev/null\necho secret\n")
    script.chmod(0o700)
    monkeypatch.setenv("CASBACKUP_PASSPHRASE_COMMAND", str(script))
    disk = wrapped.disk()
    with disk.open("rb") as file:
        process = start("backup", "vm/200", "scsi0=-", "-q", stdin=file)
        assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 0)
    wrapped.ok("restore", "vm/200", "--to", wrapped.folder / "out", "-q")
    assert (wrapped.folder / "out" / "scsi0.raw").read_bytes() == disk.read_bytes()


def test_accents_are_the_same_however_they_are_composed(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "Gru\u0308\u00dfe")
    bare.ok("key", "create", "-q")
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "Gr\u00fc\u00dfe")
    bare.ok("key", "export", "--plain", "-q")


ON_A_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); " + START


def typed(start: Start, lines: list[str], *arguments: object) -> tuple[int, str]:
    """Run a command on a terminal and answer its prompts; its status and all that the terminal showed."""
    ours, theirs = os.openpty()
    process = start(*arguments, code=ON_A_TERMINAL, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""
    answers = iter(lines)
    try:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
            if data.rstrip(b" ").endswith(b":"):
                os.write(ours, next(answers).encode() + b"\n")
    finally:
        os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_at_a_terminal_a_new_passphrase_is_asked_for_twice(bare: Casbackup, start: Start) -> None:
    status, shown = typed(start, ["secret", "secret"], "init", "--encrypted")
    assert status == 0 and "New passphrase" in shown and "again" in shown
    assert "secret" not in shown
    status, shown = typed(start, ["wrong", "secret"], "key", "export", "--plain")
    assert status == 0 and "Wrong." in shown and "BEGIN CASBACKUP KEY" in shown


def test_at_a_terminal_mistakes_are_noticed(bare: Casbackup, folder: Path, start: Start) -> None:
    status, shown = typed(start, ["secret", "secrte"], "init", "--encrypted")
    assert status == 2 and "not the same" in shown
    assert not bare.repository.exists() and not folder.exists()


def test_listing_asks_nobody(wrapped: Casbackup, start: Start) -> None:
    status, shown = typed(start, [], "snapshots")
    assert status == 0 and "vm/100" in shown and "assphrase" not in shown


def test_a_new_passphrase_leaves_the_repository_as_it_is(wrapped: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(wrapped.repository)
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "secret")
    monkeypatch.setenv("CASBACKUP_NEW_PASSPHRASE", "better")
    wrapped.ok("key", "passwd", "-q")
    assert wrapped.fails(12, "diff", "vm/100", "vm/100")["code"] == "passphrase-wrong"
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "better")
    wrapped.ok("dump", "vm/100", "scsi0", "-o", wrapped.folder / "dumped")
    assert state_of(wrapped.repository) == before
    wrapped.ok("key", "passwd", "--no-passphrase", "-q")
    monkeypatch.delenv("CASBACKUP_PASSPHRASE")
    wrapped.ok("dump", "vm/100", "scsi0", "--length", 1)
    assert wrapped.json("key", "show")["key"]["plain"]


# --- keys that are not the right ones


def test_a_repository_with_another_key_than_the_one_wanted_is_refused(
    enc: Casbackup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever keeps the repository might put another config.json there, even one without a key."""
    wanted = fingerprint(enc)
    monkeypatch.setenv("CASBACKUP_KEY", wanted)
    enc.ok("dump", "vm/100", "scsi0", "--length", 1)
    plain, foreign = enc.folder / "plain", enc.folder / "foreign"
    enc.ok("init", "-r", plain, "-q")
    enc.ok("init", "-r", foreign, "--encrypted", "--key", "0123" * 8, "-q")
    for repository in (plain, foreign):
        error = enc.fails(12, "backup", "-r", repository, "vm/100", f"scsi0={enc.disk()}")
        assert error["code"] == "key-mismatch" and wanted in error["message"]


def test_a_key_file_under_the_name_of_another(enc: Casbackup, folder: Path) -> None:
    """As when somebody renames a file so that it is found."""
    needed = fingerprint(enc)
    made = enc.json("key", "create", "--no-passphrase")["key"]
    os.replace(made["path"], folder / f"{needed}.json")
    error = enc.fails(12, "diff", "vm/100", "vm/100")
    assert error["code"] == "key-file-damaged" and made["fingerprint"] in error["message"]


def test_half_a_key_file(enc: Casbackup, folder: Path) -> None:
    path = folder / f"{fingerprint(enc)}.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error = enc.fails(12, "diff", "vm/100", "vm/100")
    assert error["code"] == "key-file-damaged" and str(path) in error["message"]
    result = enc("key", "list")
    assert (result.status, result.text) == (0, "no keys\n") and str(path) in result.err


def test_a_key_file_that_others_can_read(enc: Casbackup, folder: Path) -> None:
    path = folder / f"{fingerprint(enc)}.json"
    path.chmod(0o644)
    error = enc.fails(12, "diff", "vm/100", "vm/100")
    assert error["code"] == "key-exposed" and str(path) in error["message"]


# --- copies


def test_an_exported_key_opens_elsewhere(enc: Casbackup, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = enc.folder / "copy.json"
    monkeypatch.setenv("CASBACKUP_NEW_PASSPHRASE", "for the copy")
    enc.ok("key", "export", "-o", copy, "-q")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert enc.fails(6, "key", "export", "-o", copy)["code"] == "target-exists"
    folder.rename(folder.with_name("elsewhere"))
    enc.ok("key", "import", copy, "-q")
    assert not enc.json("key", "show")["key"]["plain"]
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "for the copy")
    enc.ok("dump", "vm/100", "scsi0", "--length", 1)
    assert enc.fails(12, "key", "import", copy)["code"] == "key-exists"


@pytest.mark.parametrize("name", ["sheet.html", "sheet.txt", "sheet"])
def test_a_sheet_is_read_back(enc: Casbackup, folder: Path, name: str) -> None:
    secret, sheet = key_of(enc).reveal(), enc.folder / name
    enc.ok("key", "paper", "-o", sheet, "-q")
    assert stat.S_IMODE(sheet.stat().st_mode) == 0o600
    assert enc.fails(12, "key", "import", sheet)["code"] == "key-exists"
    folder.rename(folder.with_name("elsewhere"))
    enc.ok("key", "import", sheet, "--no-passphrase", "-q")
    assert key_of(enc).reveal() == secret


def test_a_sheet_with_a_mistake_is_not_imported(enc: Casbackup, folder: Path) -> None:
    groups = key_groups(key_of(enc))
    groups[6] = ("Z" if groups[6][0] != "Z" else "Y") + groups[6][1:]
    sheet = enc.folder / "typed.txt"
    sheet.write_text(" ".join(groups))
    folder.rename(folder.with_name("elsewhere"))
    error = enc.fails(12, "key", "import", sheet, "--no-passphrase")
    assert error["code"] == "key-mistyped" and "group 7" in error["message"]
    assert not folder.exists()


def test_a_typed_sheet(enc: Casbackup, folder: Path, start: Start) -> None:
    text = enc.ok("key", "export", "--plain").out.lower()
    folder.rename(folder.with_name("elsewhere"))
    out, err = start("key", "import", "--no-passphrase", stdin=subprocess.PIPE).communicate(text, timeout=60)
    assert (out.decode(), err) == (f"imported key {fingerprint(enc)}\n", b"")


def test_the_code_on_a_page_is_a_qr_code(enc: Casbackup) -> None:
    page = enc.folder / "sheet.svg"
    enc.ok("key", "paper", "-o", page, "-q")
    assert "<svg" in page.read_text()
    assert "▀" in enc.ok("key", "paper").text
    html = enc.ok("key", "paper", "--format", "html").text
    assert "<svg" in html and "http" not in html.replace('xmlns="http://www.w3.org', "")


def test_the_drawn_code_can_be_scanned(enc: Casbackup) -> None:
    """The blocks are those of the code, dark on light."""
    import segno

    from casbackup.keys.text import code_text

    drawn = [line for line in enc.ok("key", "paper").text.split("\n") if set(line) <= set(" ▀▄█")]
    rows = [[c in "▀█" for c in line] for line in drawn], [[c in "▄█" for c in line] for line in drawn]
    modules = [row for pair in zip(*rows, strict=True) for row in pair if any(row)]
    expected = [list(map(bool, row)) for row in segno.make(code_text(key_of(enc)), error="m", micro=False).matrix]
    assert [row[4 : 4 + len(expected)] for row in modules] == expected


def test_with_a_copy_in_the_repository_a_passphrase_is_enough(
    wrapped: Casbackup, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped.ok("key", "store", "-q")
    wrapped.ok("key", "store", "-q")
    needed = fingerprint(wrapped)
    assert [path.name for path in (wrapped.repository / "keys").iterdir()] == [f"{needed}.json"]
    shutil.rmtree(folder)
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "wrong")
    assert wrapped.fails(12, "diff", "vm/100", "vm/100")["code"] == "passphrase-wrong"
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "secret")
    wrapped.ok("dump", "vm/100", "scsi0", "--length", 1)
    assert not folder.exists()
    wrapped.ok("key", "import", "--from-repository", "-q")
    assert fingerprint(wrapped) == needed
    wrapped.ok("gc", "-q")
    wrapped.ok("check", "-q")


def test_init_stores_a_copy(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "secret")
    made = bare.json("init", "--encrypted", "--store-key")["new_key"]["fingerprint"]
    stored = bare.repository / "keys" / f"{made}.json"
    assert stored.read_bytes() == Path(bare.json("key", "show")["key"]["path"]).read_bytes()


def test_an_unprotected_key_never_gets_into_a_repository(enc: Casbackup) -> None:
    assert enc.fails(2, "key", "store")["code"] == "usage"
    assert not (enc.repository / "keys").exists()


def test_an_unprotected_key_in_a_repository_is_not_used(enc: Casbackup, folder: Path) -> None:
    """Whoever keeps the repository could have put a key of their own there, with a config.json to fit."""
    (enc.repository / "keys").mkdir()
    os.replace(folder / f"{fingerprint(enc)}.json", enc.repository / "keys" / f"{json_fingerprint(enc)}.json")
    assert enc.fails(2, "diff", "vm/100", "vm/100")["code"] == "usage"
    assert enc.fails(2, "key", "import", "--from-repository")["code"] == "usage"


def json_fingerprint(cb: Casbackup) -> str:
    """That of the repository."""
    return str(json.loads((cb.repository / "config.json").read_text())["key_fingerprint"])


@pytest.mark.skipif(AGE is None, reason="the program age-keygen is not installed")
def test_a_copy_in_the_repository_is_opened_by_an_identity_only_if_it_is_the_one_wanted(
    enc: Casbackup, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, recipient = age_pair(enc.folder)
    enc.ok("key", "recipient", "add", recipient, "-q")
    enc.ok("key", "store", "-q")
    needed = fingerprint(enc)
    folder.rename(folder.with_name("elsewhere"))
    diff = ("diff", "vm/100", "vm/100", "--identity", identity)
    error = enc.fails(12, *diff)
    assert error["code"] == "key-missing" and "CASBACKUP_KEY" in error["message"]
    monkeypatch.setenv("CASBACKUP_KEY", needed)
    enc.ok(*diff)
    monkeypatch.delenv("CASBACKUP_KEY")
    enc.ok("key", "import", "--from-repository", "-q")
    enc.ok(*diff)


# --- recipients


@pytest.mark.skipif(AGE is None, reason="the program age-keygen is not installed")
def test_recipients(enc: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, recipient = age_pair(enc.folder)
    before = state_of(enc.repository)
    assert enc.json("key", "recipient", "add", recipient)["key"]["recipients"] == [recipient]
    assert enc.ok("key", "recipient", "list").text == f"{recipient}\n"
    monkeypatch.setenv("CASBACKUP_NEW_PASSPHRASE", "secret")
    enc.ok("key", "passwd", "-q")
    enc.ok("dump", "vm/100", "scsi0", "--length", 1, "--identity", identity)
    monkeypatch.setenv("CASBACKUP_AGE_IDENTITY", str(identity))
    enc.ok("dump", "vm/100", "scsi0", "--length", 1)
    assert enc.json("key", "recipient", "remove", recipient)["key"]["recipients"] == []
    assert enc.fails(12, "diff", "vm/100", "vm/100")["code"] == "passphrase-needed"
    assert enc.fails(2, "key", "recipient", "remove", recipient)["code"] == "usage"
    assert state_of(enc.repository) == before


@pytest.mark.skipif(AGE is None, reason="the program age-keygen is not installed")
def test_a_key_for_recipients_only(bare: Casbackup) -> None:
    _, recipient = age_pair(bare.folder)
    made = bare.json("init", "--encrypted", "--recipient", recipient)["new_key"]
    assert made["recipients"] == [recipient] and not made["passphrases"] and not made["plain"]
    assert bare.fails(2, "key", "recipient", "remove", recipient)["code"] == "usage"


def age_pair(folder: Path) -> tuple[Path, str]:
    identity = folder / "identity.txt"
    subprocess.run(["age-keygen", "-o", identity], capture_output=True, check=True)
    shown = subprocess.run(["age-keygen", "-y", identity], capture_output=True, check=True, text=True)
    return identity, shown.stdout.strip()


# --- what is told


def test_documents(enc: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet, copy = enc.folder / "sheet", enc.folder / "copy"
    monkeypatch.setenv("CASBACKUP_NEW_PASSPHRASE", "secret")
    commands: list[tuple[type, list[object]]] = [
        (documents.InitDocument, ["init", "-r", enc.folder / "other", "--encrypted", "--no-passphrase"]),
        (documents.KeyResultDocument, ["key", "create", "--no-passphrase"]),
        (documents.KeysDocument, ["key", "list"]),
        (documents.KeyResultDocument, ["key", "show", json_fingerprint(enc)[:8]]),
        (documents.KeyCopyDocument, ["key", "paper", json_fingerprint(enc)]),
        (documents.KeyCopyDocument, ["key", "paper", json_fingerprint(enc), "-o", sheet]),
        (documents.KeyCopyDocument, ["key", "export", json_fingerprint(enc), "--plain"]),
        (documents.KeyCopyDocument, ["key", "export", json_fingerprint(enc), "-o", copy]),
        (documents.KeyResultDocument, ["key", "passwd", json_fingerprint(enc)]),
        (documents.KeyResultDocument, ["key", "store"]),
        (documents.KeyResultDocument, ["key", "recipient", "list", "--key", json_fingerprint(enc)]),
    ]
    for kind, arguments in commands:
        conforms(enc.json(*arguments), kind, " ".join(map(str, arguments[:2])))


def test_nothing_tells_the_secret_unless_asked_to(enc: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(enc)
    secrets = [*key_groups(key), key.reveal().hex(), repr(key.reveal())]
    monkeypatch.setenv("CASBACKUP_DEBUG", "1")
    told = ""
    for command in ("key show", "key show --json", "key list -v", "snapshots -v", "show vm/100", "dump vm/9 scsi0 -v"):
        result = enc(*command.split())
        told += result.text + result.err
    for path in [path for path in enc.repository.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        assert key.reveal() not in data and not [s for s in secrets if len(s) > 5 and s.encode() in data], path
    assert not [secret for secret in secrets if secret in told]


def test_no_option_takes_a_secret() -> None:
    """What stands on a command line, everybody on the machine can read."""
    names: list[str] = []

    def visit(command: click.Command) -> None:
        names.extend(
            name
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.is_flag
            for name in parameter.opts
        )
        for child in command.commands.values() if isinstance(command, click.Group) else ():
            visit(child)

    context = click.Context(cli)
    for name in (name for section in SECTIONS.values() for name in section):
        found = cli.get_command(context, name)
        assert found is not None
        visit(found)
    assert "--identity" in names
    assert not [name for name in names if "pass" in name or "secret" in name]


IN_A_CHILD = """
import ctypes, os, resource, subprocess, sys
from casbackup_client.main import main
user, *words = sys.argv[1:]
if user:
    os.chdir("warm")  # a first run: the interpreter may be where nobody else can import from
    seen, os.environ["XDG_STATE_HOME"] = os.environ["XDG_STATE_HOME"], os.getcwd()
    assert main([*words, "-r", "repository"]) == 0
    os.chdir("..")
    os.environ["XDG_STATE_HOME"] = seen
    os.setgroups([]), os.setgid(int(user)), os.setuid(int(user))
assert main(words) == 0
assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0  # PR_GET_DUMPABLE
assert os.listdir("/proc/self/fd")
subprocess.run(["true"], check=True, close_fds=True)
"""


@pytest.mark.parametrize("user", ["", pytest.param("65534", marks=pytest.mark.root)])
def test_no_core_dumps_once_there_is_a_key(
    enc: Casbackup, start: Start, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all works on, also without the rights of root."""
    if user and os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as name:  # pytest's own are in a folder that only its user can enter
        place = Path(name)
        shutil.copytree(enc.folder, place, dirs_exist_ok=True)
        shutil.copytree(enc.folder, place / "warm")
        for variable, value in (("REPOSITORY", "repository"), ("KEY_FOLDER", "keys")):
            monkeypatch.setenv(f"CASBACKUP_{variable}", str(place / value))
        monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
        for command in (
            "backup vm/100 scsi0=vm.raw -q",
            "restore vm/100 --to out --force -q",
            "dump vm/100 scsi0 -o x --force",
        ):
            for path in [place, *place.rglob("*")] if user else ():
                os.chown(path, int(user), int(user))
            process = start(user, *command.split(), code=IN_A_CHILD, cwd=place)
            err = process.communicate(timeout=60)[1].decode()
            assert process.returncode == 0, err
        assert (place / "out" / "scsi0.raw").read_bytes() == (place / "vm.raw").read_bytes()


def test_another_repository_in_its_place_is_noticed(enc: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says that its key is the right one."""
    before = json_fingerprint(enc)
    enc.repository.rename(enc.folder / "moved")
    other = enc.json("init", "-r", enc.folder / "other", "--encrypted", "--no-passphrase")["repository"]["key"]
    (enc.folder / "other").rename(enc.repository)
    error = enc.fails(12, "backup", "vm/100", f"scsi0={enc.disk()}")
    assert error["code"] == "key-mismatch" and before in error["message"]
    monkeypatch.setenv("CASBACKUP_KEY", other)
    enc.ok("backup", "vm/100", f"scsi0={enc.disk()}", "-q")
    monkeypatch.delenv("CASBACKUP_KEY")
    enc.ok("backup", "vm/100", f"scsi0={enc.disk()}", "-q")


@pytest.mark.parametrize("chosen", ["profile", "environment"])
def test_each_end_has_its_own_passphrase_and_key(bare: Casbackup, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """What a profile says counts before the environment, which is for the other end."""
    from casbackup_client.app import App, KeyUse
    from casbackup_client.ends import find_ends, opened

    fingerprints = []
    for name in ("environment", "profile"):
        monkeypatch.setenv("CASBACKUP_PASSPHRASE", f"of {name}")
        document = bare.json("init", "-r", bare.folder / name, "--encrypted")
        fingerprints.append(document["repository"]["key"])
        (bare.folder / f"{name}.txt").write_text(f"of {name}\n")
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "of environment")
    monkeypatch.setenv("CASBACKUP_KEY", fingerprints[0])
    config = bare.folder / "config.toml"
    config.write_text(
        f'[profiles.x]\nrepository = "profile"\nkey = "{fingerprints[1]}"\npassphrase-file = "profile.txt"\n'
    )
    monkeypatch.setenv("CASBACKUP_CONFIG", str(config))
    app = App()
    ends = find_ends(app, str(bare.folder / "environment"), "profile:x")
    with opened(app, ends[chosen == "profile"], KeyUse.NEEDED) as peer:
        assert peer.config.key_fingerprint == fingerprints[chosen == "profile"]


def test_completion_of_keys(enc: Casbackup) -> None:
    from casbackup_client.app import App
    from casbackup_client.completion import fingerprints

    assert fingerprints(App(), json_fingerprint(enc)[:2]) == [json_fingerprint(enc)]
    assert fingerprints(App(), "x") == []
