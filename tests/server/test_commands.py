"""Commands against a server: those that work there, those that must be run on it, and where tokens come from."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup_client.config_file import read_file
from casbackup_server.rights import Right

from .conftest import Result, Running, grant, serving

Run = Callable[..., Result]
MiB = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    path.write_bytes(random.Random(1).randbytes(MiB))
    os.truncate(path, 9 * MiB)
    return path


def test_what_works_on_a_server(running: Running, run: Run, disk: Path, tmp_path: Path) -> None:
    def ok(*arguments: object) -> Result:
        result = run("-r", running.url, *arguments)
        assert (result.status, result.err) == (0, ""), (arguments, result.err)
        return result

    def document(*arguments: object) -> dict[str, object]:
        found: dict[str, object] = json.loads(ok(*arguments, "--json").out)
        return found

    first = document("backup", "vm/100", f"scsi0={disk}", "--label", "daily")["snapshot"]
    with disk.open("r+b") as file:
        file.write(b"changed")
    second = document("backup", "vm/100", f"scsi0={disk}")["snapshot"]
    assert first["id"] == second["parent"]  # type: ignore[index]
    assert len(document("snapshots")["snapshots"]) == 2  # type: ignore[arg-type]
    assert document("show", "vm/100")["snapshot"] == second
    assert document("stats") == json.loads(run("-r", running.folder, "stats", "--json").out)
    assert document("diff", first["id"], second["id"])["disks"][0]["differing_bytes"] > 0  # type: ignore[index]
    ok("dump", "vm/100", "scsi0", "-o", tmp_path / "dumped")
    assert (tmp_path / "dumped").read_bytes() == disk.read_bytes()
    ok("pin", "vm/100")
    ok("label", "vm/100", "--add", "weekly", "--notes", "Grüße")
    assert document("show", "vm/100")["snapshot"]["labels"] == ["weekly"]  # type: ignore[index]
    assert run("-r", running.url, "forget", "vm/100@latest").status == 1  # pinned
    assert document("forget", first["id"], "--dry-run")["freed_bytes"] > 0  # type: ignore[index,operator]
    ok("forget", first["id"])  # type: ignore[index]
    assert len(document("snapshots")["snapshots"]) == 1  # type: ignore[arg-type]
    ok("restore", "vm/100", "--to", tmp_path / "out")
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    "command", ["init", "gc", "check", "repair", "repair --rebuild-index", "migrate", "sessions", "token list"]
)
def test_what_needs_the_folder_says_so(run: Run, command: str) -> None:
    result = run("-r", "http://127.0.0.1:1/main", *command.split(), "--json")
    assert result.status == 2
    error = json.loads(result.err)["error"]
    assert error["code"] == "needs-folder"
    assert "on the server" in error["advice"]


@pytest.mark.parametrize("url", ["http://", "http://host", "https://host:0/x", "http://host:1/a/b", "http://host/.x"])
def test_addresses_that_are_none(run: Run, url: str) -> None:
    assert run("-r", url, "snapshots").status == 2


def test_a_refusal_says_what_to_ask_for(
    guarded: Running, run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("-r", guarded.url, "snapshots", "--json")
    assert json.loads(result.err)["error"]["code"] == "token-missing"
    monkeypatch.setenv("CASBACKUP_TOKEN", grant(guarded.folder, Right.READ))
    assert run("-r", guarded.url, "snapshots").status == 0
    result = run("-r", guarded.url, "backup", "vm/100", f"scsi0={disk}")
    assert result.status == 1
    assert "'backup'" in result.err and "administrator" in result.err


def test_where_tokens_come_from(guarded: Running, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = grant(guarded.folder, Right.READ)
    path = tmp_path / "token"
    path.write_text(token + "\n")
    config = tmp_path / "config.toml"
    monkeypatch.setenv("CASBACKUP_CONFIG", str(config))

    def works(profile: str = "", **environment: str) -> bool:
        config.write_text(f'[profiles.p]\nrepository = "{guarded.url}"\n{profile}')
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            result = run("--profile", "p", "snapshots")
        assert token not in result.out + result.err
        return result.status == 0

    assert not works()
    assert works(CASBACKUP_TOKEN=token)
    assert works(CASBACKUP_TOKEN_FILE=str(path))
    assert works(CASBACKUP_TOKEN_COMMAND=f"cat {path}")
    assert works(f'token = "{token}"')
    assert works('token-file = "token"')
    assert works(f'token-command = "cat {path}"')
    assert not works('token-file = "missing"')
    assert not works(CASBACKUP_TOKEN_COMMAND="false")
    assert not works(CASBACKUP_TOKEN_COMMAND=f"sh -c 'echo {token} {token}'")
    assert not works(f'token = "{token}"', CASBACKUP_TOKEN="cb1_wrong")
    assert token not in repr(read_file(str(config)))


def test_token_commands(running: Running, run: Run) -> None:
    def token(*arguments: object) -> Result:
        return run("-r", running.folder, "token", *arguments)

    created = json.loads(
        token("create", "host1", "--right", "backup", "--vm", "vm/1*", "--expires", "90d", "--json").out
    )
    assert created["secret"].startswith("cb1_")
    listed = json.loads(token("list", "--json").out)["tokens"]
    assert listed == [created["token"]]
    assert created["secret"] not in token("list").out
    assert token("create", "host1", "--right", "read").status == 2
    assert token("create", "host2").status == 2
    assert token("create", "bad name", "--right", "read").status == 2
    rotated = json.loads(token("rotate", "host1", "--json").out)
    assert rotated["secret"] != created["secret"]
    assert token("revoke", "host1").status == 0
    assert token("revoke", "host1").status == 2
    assert "no tokens" in token("list").out
    path = running.folder / "tokens.json"
    assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH
    path.write_text("{")
    assert token("list").status == 4


def test_tls(tmp_path: Path, run: Run) -> None:
    import subprocess

    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}".split(),
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("openssl is not there to make a certificate")
    with serving(tmp_path / "repository", ssl_certfile=certificate, ssl_keyfile=key) as server:
        url = server.url.replace("http:", "https:")
        result = run("-r", url, "snapshots", "--json")
        assert json.loads(result.err)["error"]["code"] == "certificate-untrusted"
        assert "certificate" in json.loads(result.err)["error"]["message"]
        assert run("-r", url, "--cacert", certificate, "snapshots").status == 0
        assert run("-r", url, "--cacert", key, "snapshots").status == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--listen", "0.0.0.0:0", "--insecure-no-auth"], "loopback"),
        (["--listen", "example.com:0", "--insecure-no-auth"], "loopback"),
        (["--listen", "nowhere"], "ADDRESS"),
        (["--tls-cert", "x"], "go together"),
        (["--repository", "x"], "NAME=PATH"),
        (["--repository", "a/b=/x"], "valid name"),
        (["--repository", "main=/x"], "twice"),
    ],
)
def test_servers_that_are_not_started(running: Running, run: Run, options: list[str], message: str) -> None:
    result = run("serve", "--repository", f"main={running.folder}", *options)
    assert result.status == 2
    assert message in result.err.replace("it must look like 127", "ADDRESS")


@pytest.mark.parametrize(
    "content",
    [
        "x",
        "listen = 1",
        "unknown = 1",
        "[tls]\ncert = 'x'",
        "[repositories.main]",
        "[repositories.'a/b']\npath = '/x'",
        "log-level = 'loud'",
        "",
    ],
)
def test_configurations_that_are_refused(run: Run, tmp_path: Path, content: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(content)
    result = run("serve", "--config", path)
    assert result.status == 2
    assert "Traceback" not in result.err


def test_a_configuration(tmp_path: Path) -> None:
    from casbackup_server.settings import read_settings, with_options

    path = tmp_path / "server.toml"
    path.write_text(
        'listen = "[::1]:80"\naudit-log = "audit"\n[tls]\ncert = "c"\nkey = "/k"\n[repositories.main]\npath = "r"\n'
    )
    settings = with_options(
        read_settings(str(path)),
        listen=None,
        repositories={"other": "/o"},
        tls_cert=None,
        tls_key=None,
        insecure_no_auth=True,
    )
    assert settings.listen == "[::1]:80"
    assert settings.audit_log == str(tmp_path / "audit")
    assert settings.tls is not None and (settings.tls.cert, settings.tls.key) == (str(tmp_path / "c"), "/k")
    assert {name: item.path for name, item in settings.repositories.items()} == {
        "main": str(tmp_path / "r"),
        "other": "/o",
    }
