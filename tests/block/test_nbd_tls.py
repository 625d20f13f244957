"""TLS between our client and server, and with other people's."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.device import BlockDevice
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.tls import server_context
from casbackup.block.nbd.uri import ClientTls, NbdAddress
from casbackup.errors import NbdConnectionFailed, UsageError
from casbackup.testing.block import BlockDeviceConformance
from casbackup.units import MiB

SIZE = 2 * MiB


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificates of a CA, a server ``localhost`` and a client; ``other/`` has another CA."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "other").mkdir()
    authority(folder)
    authority(folder / "other")
    sign(folder, "server", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    sign(folder, "client", "extendedKeyUsage=clientAuth")
    return folder


def authority(folder: Path) -> None:
    openssl(folder, "req", "-x509", *KEY, "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=test CA", "-days", "2")


def sign(folder: Path, name: str, extension: str) -> None:
    openssl(folder, "req", "-new", *KEY, f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / "extensions").write_text(extension)
    authority = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2")
    openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", *authority, "-extfile", "extensions", "-out", f"{name}-cert.pem"
    )


KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def serve(certificates: Path, tmp_path: Path) -> Iterator[Callable[..., NbdAddress]]:
    servers = list[NbdServer]()

    def start(device: BlockDevice, *, tcp: bool = True, **options: Any) -> NbdAddress:
        context = server_context(str(certificates), **options)
        servers.append(NbdServer([Export.of("", Guarded(device))], tls=context, handshake_timeout_s=1))
        where = NbdAddress(host="127.0.0.1", port=0) if tcp else NbdAddress(socket_path=str(tmp_path / "tls.sock"))
        return replace(servers[-1].listen(where), tls=ClientTls(str(certificates)))

    yield start
    for server in servers:
        server.close()


def checks() -> list[str]:
    return [name for name, _check in BlockDeviceConformance(MemoryDevice).checks()]


@pytest.mark.parametrize("check", checks())
def test_conforms_over_tls(check: str, serve: Callable[..., NbdAddress]) -> None:
    suite = BlockDeviceConformance(lambda content: NbdClient.connect(serve(MemoryDevice(content))))
    dict(suite.checks())[check]()


def test_who_is_trusted(serve: Callable[..., NbdAddress], certificates: Path) -> None:
    address = serve(MemoryDevice(SIZE))
    NbdClient.connect(replace(address, host="localhost")).close()
    NbdClient.connect(replace(address, tls=ClientTls(verify=False))).close()
    with pytest.raises(NbdConnectionFailed, match=r"no TLS: .*local issuer|no TLS: self-signed"):
        NbdClient.connect(replace(address, tls=ClientTls(str(certificates / "other"))))
    with pytest.raises(NbdConnectionFailed, match=r"no TLS: .*local issuer|no TLS: self-signed"):
        NbdClient.connect(replace(address, tls=ClientTls()))
    with pytest.raises(NbdConnectionFailed, match="Hostname mismatch"):
        NbdClient.connect(replace(address, tls=ClientTls(str(certificates), hostname="example.org")))


def test_a_unix_socket_has_no_host_name(serve: Callable[..., NbdAddress]) -> None:
    address = serve(MemoryDevice(SIZE), tcp=False)
    with NbdClient.connect(str(address)) as client:
        assert client.size_bytes == SIZE


def test_clients_must_show_a_certificate(serve: Callable[..., NbdAddress], certificates: Path) -> None:
    address = serve(MemoryDevice(SIZE), verify_clients=True)
    with NbdClient.connect(address) as client:
        client.write(0, b"x")
    with pytest.raises(NbdConnectionFailed):
        NbdClient.connect(replace(address, tls=ClientTls(verify=False)))


def test_without_tls_nothing_is_told(serve: Callable[..., NbdAddress]) -> None:
    address = serve(MemoryDevice(SIZE))
    with pytest.raises(NbdConnectionFailed, match="the server demands TLS: use nbds://"):
        NbdClient.connect(replace(address, tls=None))
    with socket.create_connection((address.host, address.port)) as stream:
        stream.recv(nbd.GREETING.size)
        stream.sendall(nbd.CLIENT_FLAGS.pack(3))
        for option in (nbd.OPT_LIST, nbd.OPT_INFO, 99):
            stream.sendall(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, 0))
            reply = stream.recv(1000)
            assert nbd.OPTION_REPLY.unpack(reply[: nbd.OPTION_REPLY.size])[2] == nbd.REP_ERR_TLS_REQD
        stream.sendall(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, nbd.OPT_EXPORT_NAME, 0))
        assert stream.recv(1) == b""


def test_nonsense_instead_of_tls(serve: Callable[..., NbdAddress]) -> None:
    address = serve(MemoryDevice(SIZE))
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"\x16\x03\x01\xff\xff"):
        with socket.create_connection((address.host, address.port)) as stream:
            stream.settimeout(5)
            stream.recv(nbd.GREETING.size)
            stream.sendall(nbd.CLIENT_FLAGS.pack(3) + nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, nbd.OPT_STARTTLS, 0))
            assert stream.recv(nbd.OPTION_REPLY.size)
            stream.sendall(nonsense)
            with contextlib.suppress(ConnectionError):
                while stream.recv(1000):
                    pass
    NbdClient.connect(address).close()


def test_a_server_without_tls(certificates: Path, tmp_path: Path) -> None:
    with NbdServer([Export.of("", MemoryDevice(SIZE))]) as server:
        address = server.listen(NbdAddress(socket_path=str(tmp_path / "plain.sock")))
        with pytest.raises(NbdConnectionFailed, match="no TLS: the server's policy forbids it"):
            NbdClient.connect(replace(address, tls=ClientTls(str(certificates))))


def test_certificates_of_no_use(certificates: Path, tmp_path: Path, serve: Callable[..., NbdAddress]) -> None:
    with pytest.raises(UsageError, match=r"server-cert\.pem and .* cannot be used: No such file"):
        server_context(str(tmp_path))
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(certificates / name, tmp_path)
    with pytest.raises(UsageError, match=r"ca-cert\.pem cannot be used"):
        server_context(str(tmp_path), verify_clients=True)
    openssl(tmp_path, "ec", "-in", "server-key.pem", "-aes256", "-passout", "pass:secret", "-out", "server-key.pem")
    with pytest.raises(UsageError, match="the key is encrypted"):
        server_context(str(tmp_path))
    (tmp_path / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(UsageError, match=r"ca-cert\.pem cannot be used"):
        NbdClient.connect(replace(serve(MemoryDevice(1)), tls=ClientTls(str(tmp_path))))


def test_closing_with_tls(serve: Callable[..., NbdAddress]) -> None:
    threads = threading.active_count()
    device = MemoryDevice(SIZE)
    with NbdServer([Export.of("", Guarded(device))]) as server:
        assert server.connections == 0
    client = NbdClient.connect(serve(device))
    client.write(0, b"x" * SIZE)
    client.close()
    assert device.content() == b"x" * SIZE
    assert threading.active_count() <= threads + 2


# --- other people's


def test_nbdcopy_and_nbdinfo_over_tls(serve: Callable[..., NbdAddress], certificates: Path, tmp_path: Path) -> None:
    for program in ("nbdinfo", "nbdcopy"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    address = serve(MemoryDevice(b"a" * SIZE), verify_clients=True)
    info = subprocess.run(["nbdinfo", str(address)], capture_output=True, text=True)
    assert "with TLS" in info.stdout, info.stderr
    subprocess.run(["nbdcopy", str(address), str(tmp_path / "copy")], check=True, timeout=30)
    assert (tmp_path / "copy").read_bytes() == b"a" * SIZE


@pytest.mark.qemu
def test_qemu_img_over_tls(serve: Callable[..., NbdAddress], certificates: Path, tmp_path: Path) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    address = serve(MemoryDevice(b"a" * SIZE))
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={certificates}"
    source = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={address.port},tls-creds=tls"
    command = ["qemu-img", "convert", "--object", credentials, "--image-opts", source, "-O", "raw"]
    subprocess.run([*command, str(tmp_path / "copy")], check=True, timeout=30)
    assert (tmp_path / "copy").read_bytes() == b"a" * SIZE


def test_our_client_and_nbdkit_with_tls(nbdkit: Any, certificates: Path) -> None:
    options = ("--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer")
    with nbdkit(*options, "pattern", f"size={SIZE}", tcp=True) as uri:
        secured = f"{uri.replace('nbd:', 'nbds:')}?tls-certificates={certificates}"
        with NbdClient.connect(secured) as client:
            buffer = bytearray(SIZE)
            client.read_into(0, memoryview(buffer))
            assert buffer == b"".join(offset.to_bytes(8, "big") for offset in range(0, SIZE, 8))
        with pytest.raises(NbdConnectionFailed, match="demands TLS"):
            NbdClient.connect(uri)
