"""What bytes look like that no format recognises, for a message that helps."""

from __future__ import annotations

_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (0, b"\x1f\x8b", "gzip-compressed data"),
    (0, b"\x89LZO\0\r\n\x1a\n", "lzop-compressed data"),
    (0, b"\xfd7zXZ\0", "xz-compressed data"),
    (0, b"BZh", "bzip2-compressed data"),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed data"),
    (0, b"VMAE", "a VMA archive without its beginning: an extent"),
    (0, b"VMA\0", "a VMA archive"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"# Disk DescriptorFile", "the descriptor of a VMDK image without its data"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image"),
    (257, b"ustar", "a tar archive"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"\x7fELF", "a program (ELF)"),
    (0, b"-----BEGIN", "a key or certificate (PEM)"),
    (0, b"age-encryption.org", "data encrypted by age"),
    (0, b"LUKS\xba\xbe", "a disk encrypted by LUKS"),
    (512, b"EFI PART", "a raw disk image with a partition table (GPT)"),
    (510, b"\x55\xaa", "a raw disk image with a boot sector"),
)


def looks_like(first_bytes: bytes) -> str:
    """A few words, which follow "it looks like"."""
    if not first_bytes:
        return "an empty file"
    for offset, magic, meaning in _MAGICS:
        if first_bytes.startswith(magic, offset):
            return meaning
    if not first_bytes.strip(b"\0"):
        return "zeros, as an empty disk image begins"
    shown = first_bytes[:16]
    return f"text: {_text(first_bytes)!r}" if _is_text(first_bytes) else f"unknown data: {shown.hex(' ')}"


def _is_text(data: bytes) -> bool:
    return all(byte in b"\t\n\r\x1b" or 32 <= byte != 127 for byte in data[:256])


def _text(data: bytes) -> str:
    return data[:40].splitlines()[0].decode("utf-8", "replace")
