"""``qemu-img``: what an image file is, and making new ones."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from casbackup.errors import SourceNotFound, ToolFailed, ToolMissing

_TIMEOUT_S = 60.0
"""For commands that only touch metadata."""
_CREATE_OPTIONS = {"vpc": ("-o", "force_size=on")}
"""Without it a vpc gets the next size that cylinders, heads and sectors can express."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What ``qemu-img info`` says of an image."""

    format: str
    size_bytes: int
    """Of the disk that the guest sees."""
    references: tuple[str, ...]
    """Other files that its header names and that are read along with it: backing, data and extent files."""


def probe(path: str, *, image_format: str | None = None) -> ImageInfo:
    """Ask ``qemu-img info``. Without ``image_format`` QEMU guesses it from the content: see ``source``.

    Works while a VM has the image open, for it takes no locks.

    :raise SourceNotFound: when there is no such file.
    :raise ToolMissing: when qemu-img is not installed.
    :raise ToolFailed: when it cannot make sense of the file.
    """
    name = local_name(path)
    if not os.path.exists(name):
        raise SourceNotFound(f"{path} does not exist")
    as_format = ["-f", image_format] if image_format is not None else []
    output = run_tool(["qemu-img", "info", "--output=json", "-U", *as_format, name])
    try:
        return _parsed(json.loads(output), name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolFailed(f"qemu-img info {path}: its output cannot be understood") from error


def create(path: str, image_format: str, size_bytes: int) -> None:
    """Make an empty image; an existing file is overwritten. QEMU rounds the size up to a multiple of 512.

    :raise ToolMissing: when qemu-img is not installed.
    :raise ToolFailed: when it refuses, for instance because the disk is full.
    """
    options = ("-q", "-f", image_format, *_CREATE_OPTIONS.get(image_format, ()))
    run_tool(["qemu-img", "create", *options, local_name(path), str(size_bytes)])


def local_name(path: str) -> str:
    """The path as QEMU's tools take it for a file, whatever it looks like.

    ``json:…``, ``nbd:…`` and ``-x`` are no file names to them; what begins with a slash is nothing else.
    """
    return os.path.abspath(path)


def run_tool(arguments: list[str]) -> bytes:
    """What the program writes to its standard output.

    :raise ToolMissing: when it is not installed.
    :raise ToolFailed: with its own message, when it fails or takes longer than a minute.
    """
    what = " ".join(arguments[:2])
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            env=tool_environment(),
            check=False,
        )
    except FileNotFoundError as error:
        raise ToolMissing(f"{arguments[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(f"{what} did not end within {_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise ToolFailed(f"{what} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        raise ToolFailed(f"{what} failed with status {done.returncode}: {tool_message(done.stderr)}")
    return done.stdout


def tool_environment() -> dict[str, str]:
    """Messages in English, so that an error reads the same everywhere."""
    return {**os.environ, "LC_ALL": "C"}


def tool_message(stderr: bytes) -> str:
    """The end of what a program said, on one line, harmless for a terminal."""
    text = "; ".join(stderr[-1000:].decode("utf-8", "replace").split("\n")).strip("; ")
    return "".join(c if c.isprintable() else "?" for c in text) or "it gave no reason"


def _parsed(info: dict[str, Any], name: str) -> ImageInfo:
    details = info.get("format-specific", {}).get("data", {})
    extents = [extent["filename"] for extent in details.get("extents", ())]
    backing = info.get("full-backing-filename") or info.get("backing-filename")
    others = [backing, details.get("data-file"), *extents]
    references = tuple(str(other) for other in others if other and other != name)
    return ImageInfo(str(info["format"]), int(info["virtual-size"]), references)
