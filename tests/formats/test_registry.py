"""Finding formats: the built-in ones, a third party's, broken ones, and none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from casbackup.errors import ArchivePluginBroken, ArchiveUnknown
from casbackup.formats import registry
from casbackup.formats.guess import looks_like
from casbackup.formats.port import RECOGNISE_BYTES, ArchiveFormat

GOOD = ArchiveFormat("good", "a test's", (".good", ".data.good"), lambda first_bytes: first_bytes.startswith(b"GOOD"))
OTHER = ArchiveFormat("other", "a test's", (".data",), lambda first_bytes: first_bytes.startswith(b"OTHER"))
MISNAMED = ArchiveFormat("somebody", "a test's", (".mis",), lambda first_bytes: False)
RAISING = ArchiveFormat("raising", "a test's", (".raising",), lambda first_bytes: bool(1 // 0))
LAST = ArchiveFormat("z", "a test's", (".z",), lambda first_bytes: first_bytes == b"LAST")
NO_FORMAT = "a string"


def point(name: str, attribute: str, module: str = "casbackup_test_plugin") -> EntryPoint:
    return EntryPoint(name, f"{module}:{attribute}", "casbackup.formats")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """The entry points that are installed, as a list to change before the first look."""
    points = [point("good", "GOOD"), point("other", "OTHER")]
    monkeypatch.setitem(sys.modules, "casbackup_test_plugin", sys.modules[__name__])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    clear()
    yield points
    clear()


def clear() -> None:
    registry._entry_points.cache_clear()
    registry._loaded.cache_clear()


# --- the built-in formats


def test_builtin_formats_are_installed() -> None:
    """After `make install`; they are entry points like anybody's."""
    assert set(registry.format_names()) >= registry.BUILT_IN
    assert registry.broken_formats() == []
    assert [f.name for f in registry.all_formats()] == registry.format_names()
    assert registry.format_by_name("vma") is registry.format_by_suffix("x/vzdump-qemu-100.VMA")


def test_builtin_formats_recognise_only_their_own(basic_vma: bytes) -> None:
    assert registry.recognise(basic_vma[:RECOGNISE_BYTES]).name == "vma"
    assert [f.name for f in registry.all_formats() if f.recognises(basic_vma[:RECOGNISE_BYTES])] == ["vma"]


def test_importing_the_registry_loads_no_format() -> None:
    code = (
        "import sys, casbackup.formats.registry as r; r.format_by_name('vma'); r.recognise(b'VMA\\0', 'x.vma.zst');"
        "assert 'importlib.metadata' not in sys.modules and 'casbackup.formats.tar' not in sys.modules;"
        "r.format_names();"
        "r.format_by_name('vma'); assert 'casbackup.formats.tar' not in sys.modules;"
        "r.recognise(b'VMA\\0', '/x/y.vma.zst'); assert 'casbackup.formats.tar' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- finding


@pytest.mark.usefixtures("installed")
def test_by_name() -> None:
    assert registry.format_by_name("good") is GOOD
    with pytest.raises(ArchiveUnknown, match="no archive format 'bad'; there are good, other"):
        registry.format_by_name("bad")


@pytest.mark.usefixtures("installed")
def test_longest_suffix_wins() -> None:
    assert registry.format_by_suffix("a.good") is GOOD
    assert registry.format_by_suffix("a.DATA") is OTHER
    assert registry.format_by_suffix("a.data.good") is GOOD
    with pytest.raises(ArchiveUnknown, match=r"\.good, \.data\.good, \.data"):
        registry.format_by_suffix("good")


@pytest.mark.usefixtures("installed")
def test_by_first_bytes() -> None:
    assert registry.recognise(b"OTHER and more") is OTHER
    with pytest.raises(ArchiveUnknown, match=r"disk\.img is in no known archive format; it looks like zeros"):
        registry.recognise(bytes(RECOGNISE_BYTES), "disk.img")


# --- broken plugins


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (point("bad", "GOOD", module="no_such_module"), "cannot be loaded: ModuleNotFoundError"),
        (point("bad", "MISSING"), "cannot be loaded: AttributeError"),
        (point("bad", "NO_FORMAT"), "is a str instead of an ArchiveFormat"),
        (point("bad", "MISNAMED"), "calls itself 'somebody'"),
    ],
)
def test_broken_plugin_harms_only_itself(installed: list[EntryPoint], broken: EntryPoint, message: str) -> None:
    installed.append(broken)
    assert registry.recognise(b"GOOD") is GOOD
    assert registry.format_by_suffix("a.good") is GOOD
    assert registry.all_formats() == [GOOD, OTHER]
    assert registry.format_names() == ["bad", "good", "other"]
    with pytest.raises(ArchivePluginBroken, match=message):
        registry.format_by_name("bad")
    (error,) = registry.broken_formats()
    assert message in str(error)


def test_broken_plugin_is_named_where_nothing_fits(installed: list[EntryPoint]) -> None:
    installed.append(point("bad", "MISSING"))
    for call in (lambda: registry.recognise(b"??"), lambda: registry.format_by_suffix("x.bad")):
        with pytest.raises(ArchiveUnknown, match="not asked: archive format bad"):
            call()


def test_module_that_raises_when_imported(
    installed: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_plugin.py").write_text("raise RuntimeError('needs a newer libfoo')\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed.append(point("bad", "FORMAT", module="raising_plugin"))
    with pytest.raises(ArchivePluginBroken, match="RuntimeError: needs a newer libfoo"):
        registry.format_by_name("bad")


def test_plugin_that_fails_to_look(installed: list[EntryPoint]) -> None:
    installed.append(point("raising", "RAISING"))
    installed.append(point("z", "LAST"))
    assert registry.recognise(b"LAST") is LAST
    with pytest.raises(ArchivePluginBroken, match="format raising failed to look at the input: ZeroDivisionError"):
        registry.recognise(b"??")


# --- what it looks like


@pytest.mark.parametrize(
    ("first_bytes", "meaning"),
    [
        (b"", "an empty file"),
        (bytes(1024), "zeros, as an empty disk image begins"),
        (b"\x28\xb5\x2f\xfd....", "zstd-compressed data"),
        (b"VMAE\0\0", "a VMA archive without its beginning: an extent"),
        (bytes(510) + b"\x55\xaa" + bytes(512), "a raw disk image with a boot sector"),
        (bytes(512) + b"EFI PART" + bytes(500), "a raw disk image with a partition table (GPT)"),
        (b"<!doctype html>\n<html>", "text: '<!doctype html>'"),
        (b"\n\n", "text: ''"),
        (b"\x01\x02\x03", "unknown data: 01 02 03"),
    ],
)
def test_guess(first_bytes: bytes, meaning: str) -> None:
    assert looks_like(first_bytes) == meaning
