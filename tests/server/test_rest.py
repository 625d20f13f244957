"""Restoring over HTTP: what there is, disks as files with ranges, exports."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
import urllib3

from casbackup.ids import DiskName
from casbackup.limits import MAX_REST_EXPORTS
from casbackup.repository.catalog import Snapshot
from casbackup.units import KiB, MiB
from casbackup_server import ranges, streaming
from casbackup_server.rights import Right

from .conftest import Running, grant

HTTP = urllib3.PoolManager(retries=False)
HOLE_BYTES = 40 * MiB


def content() -> bytes:
    data = random.Random(1).randbytes(5 * MiB + 4096)
    return data + bytes(HOLE_BYTES) + data[: 3 * MiB + 512]


CONTENT = content()
SIZE = len(CONTENT)


@pytest.fixture
def snapshot(running: Running, tmp_path: Path, run: Any) -> Snapshot:
    return backed_up(running, tmp_path, run)


def backed_up(running: Running, tmp_path: Path, run: Any) -> Snapshot:
    disk, config = tmp_path / "scsi0.raw", tmp_path / "vm.conf"
    disk.write_bytes(CONTENT)
    config.write_text("memory: 512\n")
    result = run("-r", running.folder, "backup", "vm/100", f"scsi0={disk}", "--config", f"vm.conf={config}")
    assert result.status == 0, result.err
    return running.local().snapshots()[-1]


def url(running: Running, snapshot: Snapshot, rest: str = "/disks/scsi0") -> str:
    return f"{running.api}/snapshots/{snapshot.id}{rest}"


def get(address: str, method: str = "GET", **headers: str) -> urllib3.BaseHTTPResponse:
    return HTTP.request(method, address, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_browsing(running: Running, snapshot: Snapshot) -> None:
    api = running.api
    assert get(f"{api}/namespaces").json() == {"namespaces": [{"name": "default", "vms": 1, "snapshots": 1}]}
    vm = get(f"{api}/vms?namespace=default").json()["vms"][0]
    assert (vm["name"], vm["snapshots"], vm["latest"]) == ("vm/100", 1, snapshot.id)
    listed = get(f"{api}/snapshots?vm=vm/100&last=1").json()
    assert listed["total"] == 1
    one = get(url(running, snapshot, "")).json()
    assert one == listed["snapshots"][0] == get(f"{api}/snapshots/{snapshot.id[:8]}").json()
    root = snapshot.manifest.disks[0].root.hex()
    assert one["disks"] == [{"name": "scsi0", "size_bytes": SIZE, "root": root, "role": ""}]
    config = one["configs"][0]["name"]
    assert get(url(running, snapshot, f"/configs/{config}")).data == b"memory: 512\n"
    for path in ("/snapshots/abcd", f"/snapshots/{snapshot.id}/disks/none", f"/snapshots/{snapshot.id}/configs/none"):
        assert (get(api + path).status, get(api + path).json()["code"]) == (404, "snapshot-not-found")
    assert get(f"{api}/snapshots?offset=1").json() == {"total": 1, "snapshots": []}


def test_a_whole_disk(running: Running, snapshot: Snapshot) -> None:
    answer = get(url(running, snapshot))
    assert answer.status == 200
    assert answer.data == CONTENT
    assert answer.headers["Content-Length"] == str(SIZE)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["ETag"] == f'"{snapshot.manifest.disks[0].root.hex()}"'
    head = get(url(running, snapshot), "HEAD")
    assert head.status == 200
    for name in ("Content-Length", "ETag", "Accept-Ranges", "Last-Modified"):
        assert head.headers[name] == answer.headers[name]


def test_a_range(running: Running, snapshot: Snapshot) -> None:
    for asked, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=4097-1052672", 4097, 1052673),
        ("bytes=5246974-5246980", 5246974, 5246981),
        (f"bytes={SIZE - 7}-", SIZE - 7, SIZE),
        ("bytes=-1000", SIZE - 1000, SIZE),
        (f"bytes=-{10 * SIZE}", 0, SIZE),
        (f"bytes={SIZE - 1}-{SIZE + 10**9}", SIZE - 1, SIZE),
        (f"bytes={6 * MiB}-{30 * MiB}", 6 * MiB, 30 * MiB + 1),
        ("Bytes = 5-9 ,", 5, 10),
    ):
        answer = get(url(running, snapshot), Range=asked)
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert answer.data == CONTENT[start:end], asked


def test_several_ranges(running: Running, snapshot: Snapshot) -> None:
    spans = [(5 * MiB, 5 * MiB + 99), (0, 0), (SIZE - 1000, SIZE - 1), (7 * MiB, 9 * MiB)]
    answer = get(url(running, snapshot), Range="bytes=" + ", ".join(f"{a}-{b}" for a, b in spans))
    assert answer.status == 206
    assert len(answer.data) == int(answer.headers["Content-Length"])
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    message = message_from_bytes(head + answer.data, policy=policy.HTTP)
    parts = list(message.iter_parts())  # type: ignore[attr-defined]
    assert [part["Content-Range"] for part in parts] == [f"bytes {a}-{b}/{SIZE}" for a, b in spans]
    boundary = answer.headers["Content-Type"].partition("boundary=")[2].encode()
    bodies = [part.partition(b"\r\n\r\n")[2][:-2] for part in answer.data.split(b"--" + boundary)[1:-1]]
    assert bodies == [CONTENT[a : b + 1] for a, b in spans]


def test_ranges_that_are_not_there(running: Running, snapshot: Snapshot) -> None:
    for asked in (f"bytes={SIZE}-", "bytes=-0", f"bytes={SIZE * 2}-{SIZE * 3}", "bytes=0-,0-"):
        answer = get(url(running, snapshot), Range=asked)
        assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
        assert answer.json()["status"] == 416


def test_too_many_ranges(running: Running, snapshot: Snapshot) -> None:
    assert get(url(running, snapshot), Range="bytes=" + ",".join(f"{n}-{n}" for n in range(65))).status == 416


@pytest.mark.parametrize("asked", ["bytes=9-5", "lines=1-2", "bytes=a-b", "bytes=", "bytes=-", "0-5", "bytes=1-2;3-4"])
def test_ranges_that_are_none(asked: str) -> None:
    assert ranges.parse_ranges(asked, 100) is None


def test_conditions(running: Running, snapshot: Snapshot) -> None:
    etag = f'"{snapshot.manifest.disks[0].root.hex()}"'
    for given in (etag, f'"x", W/{etag}', "*"):
        answer = get(url(running, snapshot), If_None_Match=given)
        assert (answer.status, answer.data, answer.headers["ETag"]) == (304, b"", etag)
        assert get(url(running, snapshot), "HEAD", If_None_Match=given).status == 304
    assert get(url(running, snapshot), If_None_Match='"x"', Range="bytes=0-9").status == 206
    modified = get(url(running, snapshot), "HEAD").headers["Last-Modified"]
    for good in (etag, modified):
        assert get(url(running, snapshot), If_Range=good, Range="bytes=0-9").status == 206
    for other in ('"x"', f"W/{etag}", "Thu, 01 Jan 1970 00:00:00 GMT"):
        answer = HTTP.request(
            "GET", url(running, snapshot), headers={"If-Range": other, "Range": "bytes=0-9"}, preload_content=False
        )
        assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))
        answer.close()


def test_an_empty_disk_and_one_of_zeros(running: Running, tmp_path: Path, run: Any) -> None:
    (tmp_path / "a.raw").write_bytes(b"")
    with (tmp_path / "b.raw").open("wb") as file:
        file.truncate(300 * MiB)
    result = run("-r", running.folder, "backup", "vm/1", f"a={tmp_path / 'a.raw'}", f"b={tmp_path / 'b.raw'}")
    assert result.status == 0, result.err
    made = running.local().snapshots()[-1]
    assert get(url(running, made, "/disks/a")).data == b""
    assert get(url(running, made, "/disks/a"), Range="bytes=0-").status == 416
    assert get(url(running, made, "/disks/b")).data == bytes(300 * MiB)


def test_damage_breaks_the_connection(running: Running, snapshot: Snapshot) -> None:
    """A short body must never look like a whole one."""
    for pack in running.folder.glob("packs/*/*.pack"):
        data = bytearray(pack.read_bytes())
        for at in range(2 * MiB, 3 * MiB, 64 * KiB):
            data[at] ^= 1
        pack.write_bytes(data)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        get(url(running, snapshot))
    with pytest.raises(urllib3.exceptions.ProtocolError):
        get(url(running, snapshot, "/export?format=vma"))
    assert get(url(running, snapshot, "/export?format=raw")).status == 500  # it has no head that would come before
    answer = get(url(running, snapshot), Range=f"bytes={3 * MiB // 2}-{7 * MiB // 2}")
    assert (answer.status, answer.json()["code"]) == (500, "blob-damaged")
    assert get(url(running, snapshot), Range="bytes=0-99").data == CONTENT[:100]


def test_a_client_that_takes_nothing(running: Running, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import time

    monkeypatch.setattr(streaming, "STALL_S", 0.2)
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        path = url(running, snapshot).partition(str(running.port))[2]
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        reading = running.server.repositories["main"].reading
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not any(entry.users for entry in reading._open.values()):
            time.sleep(0.01)
        while time.monotonic() < deadline and any(entry.users for entry in reading._open.values()):
            time.sleep(0.01)
        assert not any(entry.users for entry in reading._open.values())


def test_a_forgotten_snapshot_is_not_served(running: Running, snapshot: Snapshot) -> None:
    assert get(url(running, snapshot), Range="bytes=0-9").status == 206
    running.local().remove([snapshot])
    assert get(url(running, snapshot), Range="bytes=0-9").status == 404
    reading = running.server.repositories["main"].reading
    reading.close_idle(0)
    assert not reading._open


@pytest.mark.parametrize("name", ["vma", "tar", "raw"])
def test_export(running: Running, snapshot: Snapshot, run: Any, tmp_path: Path, name: str) -> None:
    answer = get(url(running, snapshot, f"/export?format={name}"))
    assert answer.status == 200
    assert "filename=" in answer.headers["Content-Disposition"]
    result = run("-r", running.folder, "export", "vm/100", tmp_path / "expected", "--format", name)
    assert result.status == 0, result.err
    assert answer.data == (tmp_path / "expected").read_bytes()
    for compress, decompressed in (("zstd", _zstd), ("gzip", gzip.decompress)):
        compressed = get(url(running, snapshot, f"/export?format={name}&compress={compress}")).data
        assert decompressed(compressed) == answer.data


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def test_export_of_a_disk_as_tar(running: Running, snapshot: Snapshot) -> None:
    answer = get(url(running, snapshot, "/export?format=tar&disk=scsi0"))
    with tarfile.open(fileobj=io.BytesIO(answer.data)) as archive:
        assert any(member.size for member in archive.getmembers())
    assert snapshot.manifest.disks[0].name == DiskName("scsi0")


@pytest.mark.parametrize(
    ("query", "status"),
    [("format=none-such", 400), ("compress=lzop", 422), ("disk=nope", 404), ("format=../x", 422)],
)
def test_exports_that_are_refused(running: Running, snapshot: Snapshot, query: str, status: int) -> None:
    assert get(url(running, snapshot, f"/export?{query}")).status == status


def test_exports_have_a_limit_and_give_their_places_back(running: Running, snapshot: Snapshot) -> None:
    import time

    address = url(running, snapshot, "/export?format=raw")
    under_way = [HTTP.request("GET", address, preload_content=False) for _ in range(MAX_REST_EXPORTS)]
    assert get(address).status == 503
    for answer in under_way:
        answer.close()
    deadline = time.monotonic() + 20
    while (answer := get(address)).status == 503 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer.data == CONTENT


def test_what_a_token_does_not_cover_is_not_there(guarded: Running, tmp_path: Path, run: Any) -> None:
    made = backed_up(guarded, tmp_path, run)
    mine = {"Authorization": f"Bearer {grant(guarded.folder, Right.RESTORE, vms=('vm/100',))}"}
    other = {"Authorization": f"Bearer {grant(guarded.folder, Right.RESTORE, vms=('vm/200',))}"}
    only_read = {"Authorization": f"Bearer {grant(guarded.folder, Right.READ)}"}
    for path in ("", "/disks/scsi0", "/export"):
        assert get(url(guarded, made, path), **mine).status == 200
        assert get(url(guarded, made, path), **other).status == 404
        assert get(url(guarded, made, path), **only_read).status == (403 if path else 200)
    assert get(f"{guarded.api}/vms", **other).json() == {"vms": []}
    assert get(f"{guarded.api}/snapshots", **other).json() == {"total": 0, "snapshots": []}
