"""Finding formats: by name, by a file's suffix, by an archive's first bytes.

Formats are entry points in the group ``casbackup.formats``, the built-in ones like anybody's:

    [project.entry-points."casbackup.formats"]
    myformat = "mypackage.mymodule:FORMAT"        an ArchiveFormat whose name is "myformat"

Listing entry points takes some 30 ms and loading them imports their modules, so both happen when they are first
needed. A built-in format that is asked for by name, or that a file's name speaks of, is found without. A plugin that
cannot be loaded spoils nothing but itself: it is an error to ask for it by name, and it is named where nothing else
fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from casbackup.errors import ArchivePluginBroken, ArchiveUnknown
from casbackup.formats.guess import looks_like
from casbackup.formats.port import ENTRY_POINTS, ArchiveFormat

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BUILT_IN = frozenset({"qcow2", "raw", "stream", "tar", "vma", "vmdk"})
"""Formats that are modules of this package; nobody else's can take their names."""


def format_names() -> list[str]:
    """Names of all formats that are installed, whether or not they can be loaded. Loads none."""
    return sorted(_entry_points())


def all_formats() -> list[ArchiveFormat]:
    """All formats that can be loaded, by name."""
    return list(_loaded_formats())


def broken_formats() -> list[ArchivePluginBroken]:
    """Why the other ones cannot be loaded."""
    found = (_loaded(name) for name in format_names())
    return [error for error in found if isinstance(error, ArchivePluginBroken)]


def format_by_name(name: str) -> ArchiveFormat:
    """The format of that name; loads no other.

    :raise ArchiveUnknown: when there is none. :raise ArchivePluginBroken: when it cannot be loaded.
    """
    if name not in BUILT_IN and name not in _entry_points():
        raise ArchiveUnknown(f"there is no archive format {name!r}; there are {_listed(format_names())}")
    loaded = _loaded(name)
    if isinstance(loaded, ArchivePluginBroken):
        raise loaded
    return loaded


def format_by_suffix(path: str) -> ArchiveFormat:
    """The format that a file's name ends like, the longest suffix first; upper and lower case are the same.

    :raise ArchiveUnknown: when there is none.
    """
    lower = path.lower()
    fitting = [(len(s), f) for f in _loaded_formats() for s in f.suffixes if lower.endswith(s.lower())]
    if not fitting:
        endings = _listed([suffix for f in _loaded_formats() for suffix in f.suffixes])
        raise ArchiveUnknown(f"the name {path!r} does not tell a format; these endings do: {endings}{_broken_note()}")
    return max(fitting, key=lambda pair: pair[0])[1]


def recognise(first_bytes: bytes, name: str = "the input") -> ArchiveFormat:
    """The format of an archive that begins like this. ``first_bytes``: ``RECOGNISE_BYTES`` of it, or all it has.

    A format whose own name is in ``name`` is asked first, which in most cases saves loading the others.

    :raise ArchiveUnknown: when no format knows it; the message says what it looks like.
    :raise ArchivePluginBroken: when none knows it, and one failed to look at it.
    """
    failures: list[ArchivePluginBroken] = []
    for archive_format in _loaded_formats(first_in=name.lower()):
        try:
            if archive_format.recognises(first_bytes):
                return archive_format
        except Exception as error:  # noqa: BLE001 - it is somebody else's code
            failure = ArchivePluginBroken(f"format {archive_format.name} failed to look at {name}: {error!r}")
            failure.__cause__ = error
            failures.append(failure)
    if failures:
        raise failures[0]
    raise ArchiveUnknown(
        f"{name} is in no known archive format; it looks like {looks_like(first_bytes)}{_broken_note()}"
    )


def _loaded_formats(first_in: str = "") -> Iterator[ArchiveFormat]:
    """By name, but those whose name is in ``first_in`` before the others, and built-in ones before all."""
    likely = sorted(name for name in BUILT_IN if name in first_in)
    for name in likely:
        yield format_by_name(name)
    others = [name for name in format_names() if name not in likely]
    for name in sorted(others, key=lambda name: name not in first_in):
        loaded = _loaded(name)
        if isinstance(loaded, ArchiveFormat):
            yield loaded


@cache
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # noqa: PLC0415  takes 30 ms to import

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _loaded(name: str) -> ArchiveFormat | ArchivePluginBroken:
    """Each is loaded once. An error is kept, not raised, so that it is told only to whom it concerns."""
    if name in BUILT_IN:
        built_in: ArchiveFormat = import_module(f"casbackup.formats.{name}").FORMAT
        return built_in
    point = _entry_points()[name]
    where = f"archive format {name} ({point.value}{_package(point)})"
    try:
        loaded = point.load()
    except Exception as error:  # noqa: BLE001 - importing somebody else's code may raise anything
        return ArchivePluginBroken(f"{where} cannot be loaded: {type(error).__name__}: {error}")
    if not isinstance(loaded, ArchiveFormat):
        return ArchivePluginBroken(f"{where} is a {type(loaded).__name__} instead of an ArchiveFormat")
    if loaded.name != name:
        return ArchivePluginBroken(f"{where} calls itself {loaded.name!r}")
    return loaded


def _package(point: EntryPoint) -> str:
    return f" of package {point.dist.name} {point.dist.version}" if point.dist else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _broken_note() -> str:
    """Which formats could not be asked, for messages that nothing fits."""
    broken = broken_formats()
    return f"; not asked: {'; '.join(map(str, broken))}" if broken else ""
