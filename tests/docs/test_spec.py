"""The pages of ``docs/spec/``: byte tables as in the structs, examples as the code makes them.

    python tests/docs/test_spec.py       writes the examples into the pages

A table that is compared stands below ``<!-- layout: NAME -->``, an example below ``<!-- example: NAME -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct
from typing import NamedTuple
from unittest.mock import patch

import msgpack
import pytest
from blake3 import blake3

from casbackup import limits
from casbackup.chunking import block_sample
from casbackup.codec import codec, crypto, hashing
from casbackup.codec.master_key import MasterKey
from casbackup.formats.port import ArchiveDisk, ArchiveHead
from casbackup.formats.qcow2 import layout as qcow2
from casbackup.formats.stream.writer import StreamWriter
from casbackup.formats.vmdk import layout as vmdk
from casbackup.ids import ZERO_ID, DiskName, Namespace, PackId, SessionId, VmName
from casbackup.keys.text import ALPHABET, code_text, format_key
from casbackup.keys.wrapping import wrap_by_passphrase
from casbackup.spec import archiver, indexdb, keyfile, magic, manifest, node, outline, pack, record, vma, wire
from casbackup.spec.config import ChunkerConfig, RepositoryConfig, encode_config
from casbackup.store.packfile import encode_footer, encode_header
from casbackup.testing.archives import MemoryTarget
from casbackup.units import MiB

PAGES = Path(__file__).parents[2] / "docs" / "spec"

# --- tables


class Field(NamedTuple):
    offset: int
    length: int


def fields_of(layout: Struct) -> list[Field]:
    """The fields of a struct, padding included. Neighbouring fields of padding are one."""
    fields: list[Field] = []
    offset = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        whole = code in "sx"
        length = int(count or 1) if whole else Struct("<" + code).size
        for _ in range(1 if whole else int(count or 1)):
            fields.append(Field(offset, length))
            offset += length
    assert offset == layout.size
    return fields


def with_checksum(layout: Struct, length: int) -> list[Field]:
    return [*fields_of(layout), Field(layout.size, length)]


LAYOUTS: dict[str, list[Field]] = {
    "archiver frame": fields_of(archiver.FRAME),
    "pack header": with_checksum(pack._HEADER, 16),
    "record header": with_checksum(record._CHECKED, record.CHECKSUM_BYTES),
    "footer entry": fields_of(pack._ENTRY),
    "pack trailer": with_checksum(pack._TRAILER, 16),
    "leaf header": fields_of(node._HEADER),
    "extent": fields_of(node._EXTENT),
    "inner header": fields_of(node._HEADER),
    "lost record": fields_of(wire._LOST),
    "manifest header": fields_of(manifest._HEADER),
    "blob entry": fields_of(indexdb.BLOB_VALUE),
    "outline header": fields_of(outline._HEADER),
    "outline chunk": fields_of(outline._CHUNK),
    "qcow2 header": fields_of(qcow2.HEADER),
    "snapshot frame": fields_of(wire._SNAPSHOT),
    "vma device": fields_of(vma.DEVICE),
    "vma extent": fields_of(vma.EXTENT),
    "vma header": fields_of(vma.HEADER),
    "vmdk header": fields_of(vmdk.HEADER),
    "vmdk marker": fields_of(vmdk.MARKER),
}


def page_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))


def table_below(name: str) -> list[Field]:
    found = re.search(rf"<!-- layout: {name} -->\n+((?:\|.*\n)+)", page_text())
    assert found, f"no table of the {name}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    assert rows[0][:2] == ["offset", "bytes"], rows[0]
    return [Field(int(row[0]), int(row[1])) for row in rows[2:]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_table_is_the_codes(name: str) -> None:
    assert table_below(name) == LAYOUTS[name]


def test_every_table_is_compared() -> None:
    assert set(re.findall(r"<!-- layout: (.*) -->", page_text())) == set(LAYOUTS)


# --- examples

PLAIN = b"hello, casbackup\n"
PACK = PackId("00112233445566778899aabbccddeeff")
SESSION = SessionId("0123456789abcdef0123456789abcdef")
CHUNK = codec.PLAIN.encode_blob(record.BlobKind.CHUNK, PLAIN, 2)
LEAF = node.encode_leaf([node.Extent(17, 0, CHUNK.id), node.zero_extent(4079)])
LEAF_ID = hashing.PUBLIC_KEYS.id(record.BlobKind.NODE, LEAF)
MANIFEST = manifest.Manifest(
    namespace=Namespace("default"),
    vm=VmName("vm/100"),
    time_ms=1795377600123,
    sequence=1,
    disks=(manifest.DiskRecord(DiskName("scsi0"), 4096, LEAF_ID, "/vm.raw"),),
)

Part = tuple[str, bytes]


def split(data: bytes, *parts: tuple[str, int]) -> list[Part]:
    """Cut ``data`` into named parts; it must be used up."""
    found: list[Part] = []
    for name, length in parts:
        found.append((name, data[:length]))
        data = data[length:]
    assert not data
    return found


def pack_example() -> list[Part]:
    header = encode_header(PACK, SESSION)
    first = pack.PackEntry(64, len(CHUNK.payload), CHUNK.plain_length, CHUNK.kind, CHUNK.flags, CHUNK.id)
    end = 64 + CHUNK.total_bytes
    data = header + CHUNK.header + bytes(CHUNK.payload) + encode_footer(PACK, [first], end)
    return split(
        data,
        ("header: magic", 8), ("version", 2), ("reserved", 6), ("pack id", 16), ("session id", 16),
        ("checksum", 16),
        ("record: magic", 4), ("kind: chunk", 1), ("flags: none", 1), ("reserved", 2), ("stored length", 4),
        ("plain length", 4), ("id", 32), ("checksum", 16), ("payload", 17),
        ("footer: offset", 4), ("stored length", 4), ("plain length", 4), ("kind, flags", 2), ("reserved", 2),
        ("id", 32),
        ("trailer: magic", 8), ("records", 4), ("reserved", 4), ("footer's offset", 8), ("pack id", 16),
        ("reserved", 8), ("checksum", 16),
    )  # fmt: skip


def leaf_example() -> list[Part]:
    return split(
        LEAF,
        ("type, version", 2), ("count", 2), ("span", 4),
        ("length", 4), ("skip", 4), ("chunk", 32),
        ("length", 4), ("skip", 4), ("zeros", 32),
    )  # fmt: skip


def inner_example() -> list[Part]:
    data = node.encode_inner(1, [ZERO_ID, LEAF_ID])
    return split(data, ("type, version", 2), ("count", 2), ("level", 4), ("child 0: zeros", 32), ("child 1", 32))


def manifest_example() -> list[Part]:
    data, _ = manifest.encode_manifest(MANIFEST)
    return split(
        data,
        ("magic", 8), ("version", 2), ("flags", 2), ("body length", 4), ("body", len(data) - 48),
        ("checksum", 32),
    )  # fmt: skip


def entry_example() -> list[Part]:
    value = indexdb.BlobEntry(1, 64, 17, 17, 1, 1795377600, 0, 1, 0, 0).encode()
    return split(
        value,
        ("pack number", 4), ("offset", 4), ("stored length", 4), ("plain length", 4), ("session number", 4),
        ("verified", 4), ("dying epoch", 4), ("kind, flags, state, reserved", 4),
    )  # fmt: skip


def outline_example() -> list[Part]:
    value = outline.encode_leaf_outline(152, [(CHUNK.id, CHUNK.total_bytes, CHUNK.plain_length)])
    return split(
        value,
        ("type", 1),
        ("record bytes", 4),
        ("chunk's first 8 bytes", 8),
        ("record bytes", 4),
        ("plain", 4),
    )


def hexdump(parts: list[Part]) -> str:
    """A line for each 16 bytes of a part: offset, bytes, name."""
    lines: list[str] = []
    offset = 0
    for name, data in parts:
        for start in range(0, len(data), 16):
            row = data[start : start + 16]
            lines.append(f"{offset:4}  {row.hex(' '):<47}  {name if not start else ''}".rstrip())
            offset += len(row)
    return "\n".join(lines)


def names_example() -> str:
    lines = [f"{'plain bytes':<12}{PLAIN!r}"]
    lines += [f"{f'as {kind.name.lower()}':<12}{hashing.PUBLIC_KEYS.id(kind, PLAIN).hex()}" for kind in record.BlobKind]
    return "\n".join(lines)


def keys_example() -> str:
    keys = hashing.PUBLIC_KEYS
    return "\n".join(f"{name:<8}{key.hex()}" for name, key in zip(("chunk", "node", "config"), keys, strict=True))


def config_example() -> str:
    config = RepositoryConfig("f550d5f295c6f82a21664a20021babe1", "2026-11-22T23:26:08.742Z")
    return encode_config(config).decode().strip()


def body_example() -> str:
    body = msgpack.unpackb(manifest.encode_manifest(MANIFEST)[0][16:-32])
    name, size, root, source = body["disks"][0]
    disks = f"[[{name!r}, {size}, {root.hex()}, {source!r}]]"
    lines = [f"{key:<10} {disks if key == 'disks' else value}" for key, value in body.items()]
    return "\n".join(line.rstrip() for line in lines)


def samples_example() -> str:
    return ", ".join(str(offset) for offset in block_sample._SAMPLE_OFFSETS)


def cut_table_example() -> str:
    table = block_sample._cut_table(ChunkerConfig().cuts_in_256)
    values = [f"{value:02x}" for value in range(256) if table[value]]
    return "\n".join(" ".join(values[start : start + 20]) for start in range(0, len(values), 20))


def stream_example() -> list[Part]:
    """A disk of 520 bytes: a sector of zeros, and 8 bytes."""
    target = MemoryTarget(seekable=False)
    head = ArchiveHead((ArchiveDisk("scsi0", 520),))
    output = StreamWriter().open(target, head)
    output.zeros(0, 0, 512)
    output.write(0, 512, b"the end.")
    output.finish()
    json_bytes = len(target.data) - len(archiver.MAGIC) - 4 * archiver.FRAME.size - 8
    frame = archiver.FRAME.size
    parts = [("magic", 8), ("head", frame), ("its JSON", json_bytes), ("zeros", frame)]
    return split(bytes(target.data), *parts, ("data", frame), ("its bytes", 8), ("end", frame))


MASTER = MasterKey(bytes(range(32)))
DERIVED = ("blob ids", "blob seal", "chunk boundaries", "manifest seal", "notes seal")


def derived_example() -> str:
    lines = [f"{'fingerprint':<18}{MASTER.fingerprint}"]
    return "\n".join([*lines, *(f"{n:<18}{MASTER.derived(f'casbackup 2026-11-24 {n}').hex()}" for n in DERIVED)])


def keyed_ids_example() -> str:
    ids = codec.keyed_codec(MASTER).ids
    return "\n".join(f"{f'as {kind.name.lower()}':<12}{ids.id(kind, PLAIN).hex()}" for kind in record.BlobKind)


def sealed_example() -> list[Part]:
    with patch("os.urandom", lambda length: bytes(range(length))):
        sealed = codec.keyed_codec(MASTER).encode_blob(record.BlobKind.CHUNK, b"a" * 10_000, 2)
    ciphertext = len(sealed.payload) - crypto.SEAL_BYTES
    parts = [("magic", 4), ("kind, flags, reserved", 4), ("stored length", 4), ("plain length", 4), ("id", 32)]
    return split(
        sealed.header + bytes(sealed.payload),
        *parts,
        ("checksum", 16),
        ("nonce", crypto.NONCE_BYTES),
        ("ciphertext", ciphertext),
        ("tag", crypto.TAG_BYTES),
    )


def key_file_example() -> str:
    """Wrapped by a passphrase that is cheap to try."""
    with patch("os.urandom", lambda length: bytes(range(length))):
        wrapping = wrap_by_passphrase(MASTER, PASSPHRASE, KEY_COST)
    file = keyfile.KeyFile(MASTER.fingerprint, "2026-11-24T12:00:00.000Z", "of the example", (wrapping,))
    return keyfile.encode_key_file(file).decode().strip()


PASSPHRASE = b"correct horse"
KEY_COST = crypto.Argon2Cost(1, 64, 1)

EXAMPLES: dict[str, Callable[[], str]] = {
    "archiver stream": lambda: hexdump(stream_example()),
    "ids": names_example,
    "keys": keys_example,
    "pack": lambda: hexdump(pack_example()),
    "leaf": lambda: hexdump(leaf_example()),
    "inner": lambda: hexdump(inner_example()),
    "manifest": lambda: hexdump(manifest_example()),
    "manifest body": body_example,
    "config": config_example,
    "blob entry": lambda: hexdump(entry_example()),
    "leaf outline": lambda: hexdump(outline_example()),
    "sample offsets": samples_example,
    "derived keys": derived_example,
    "key code": lambda: code_text(MASTER),
    "key file": key_file_example,
    "key text": lambda: format_key(MASTER).strip(),
    "passphrase key": lambda: crypto.passphrase_key(PASSPHRASE, bytes(range(16)), KEY_COST).hex(),
    "keyed ids": keyed_ids_example,
    "sealed record": lambda: hexdump(sealed_example()),
    "cut table": cut_table_example,
}

_EXAMPLE = r"(<!-- example: {} -->\n+```[a-z]*\n)((?:(?!```).*\n)*?(?!```).*)(\n```)"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_what_the_code_makes(name: str) -> None:
    found = re.search(_EXAMPLE.format(name), page_text())
    assert found, f"no example of {name}"
    assert found[2] == EXAMPLES[name]()


def test_every_example_is_compared() -> None:
    assert set(re.findall(r"<!-- example: (.*) -->", page_text())) == set(EXAMPLES)


# --- figures in the prose


def facts() -> Iterator[tuple[str, str]]:
    """(page, text that must stand in it)"""
    for name, value in (
        ("PACK_HEADER", magic.PACK_HEADER),
        ("PACK_TRAILER", magic.PACK_TRAILER),
        ("RECORD", magic.RECORD),
        ("LOST", magic.LOST),
        ("MANIFEST", magic.MANIFEST),
    ):
        sentence = magic.SENTENCES[name]
        assert blake3(sentence.encode()).digest().startswith(value)
        yield "overview.md", f"| `{value.hex(' ')}` | {sentence} |"
    yield "tree.md", f"{node.MAX_EXTENTS:,} extents"
    yield "tree.md", f"{limits.FANOUT} children"
    yield "tree.md", f"{limits.MAX_LEVEL} levels of inner nodes"
    yield "manifest.md", f"{limits.MAX_MANIFEST_BYTES // MiB} MiB"
    yield "manifest.md", f"snapshot id  {manifest.encode_manifest(MANIFEST)[1]}"
    yield "key-file.md", f"1 to {limits.MAX_KEY_WRAPPINGS} objects"
    yield "key-file.md", f"at most {limits.MAX_KEY_FILE_BYTES:,} bytes"
    yield "key-file.md", f"| 1 to {limits.MAX_ARGON2_ITERATIONS} |"
    yield "key-file.md", f"`lanes` to {limits.MAX_ARGON2_MEMORY_KIB:,} |"
    yield "key-file.md", f"1 to {limits.MAX_PASSPHRASE_BYTES:,} of them"
    yield "key-file.md", f"at most {limits.MAX_KEY_COMMENT_CHARACTERS} characters"
    yield "key-file.md", "{} iterations, {:,} KiB and {} lanes".format(*crypto.Argon2Cost())
    yield "key-file.md", f"`{ALPHABET}`"
    yield "vma.md", f"{vma.FIXED_BYTES:,} bytes and the blobs"
    yield "vma.md", f"{vma.WRITTEN_SLOTS} slots of an extent at the most"
    yield "vma.md", f"From offset {vma.EXTENT.size} on, {vma.SLOTS} slots"
    yield "vma.md", f"more than {vma.MAX_DEVICES} disks or {vma.CONFIGS} configs"
    yield "vma.md", f"up to {vma.MAX_HEADER_BYTES // MiB} MiB"
    for database in indexdb.DATABASES:
        yield "index.md", f"| `{database.decode()}` |"


@pytest.mark.parametrize(("page", "text"), list(facts()))
def test_prose_agrees(page: str, text: str) -> None:
    assert text in (PAGES / page).read_text(encoding="utf-8")


def test_config_keys_are_documented() -> None:
    text = (PAGES / "config.md").read_text(encoding="utf-8")
    for name in (*RepositoryConfig.__slots__, *(f"chunker.{name}" for name in ChunkerConfig.__slots__)):
        assert f"| `{name}` |" in text


def test_fields_of_key_files_are_documented() -> None:
    text = (PAGES / "key-file.md").read_text(encoding="utf-8")
    wrappings = (
        wrap_by_passphrase(MASTER, PASSPHRASE, KEY_COST),
        keyfile.AgeWrapping("age1", "file"),
        keyfile.PlainWrapping("text"),
    )
    content = json.loads(keyfile.encode_key_file(keyfile.KeyFile(MASTER.fingerprint, "", "", wrappings)))
    for name in (*content, *(name for wrapping in content["wrappings"] for name in wrapping)):
        assert f"| `{name}` |" in text, name


def test_manifest_keys_are_documented() -> None:
    text = (PAGES / "manifest.md").read_text(encoding="utf-8")
    body = msgpack.unpackb(manifest.encode_manifest(MANIFEST)[0][16:-32])
    stats = (f"stats.{name}" for name in manifest.BackupStats.__slots__)
    archive = (f"archive.{name}" for name in manifest.ArchiveOrigin._fields)
    for name in (*body, *stats, "archive", *archive):
        assert f"| `{name}` |" in text
    assert f"At most {limits.MAX_RECORDED_GAPS:,} ranges" in text


def write_examples() -> None:
    for page in PAGES.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name, make in EXAMPLES.items():
            found = re.search(_EXAMPLE.format(name), text)
            if found:
                text = text[: found.start(2)] + make() + text[found.end(2) :]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_examples()
