"""What a step is. As frozen as the steps: a field may be added if it has a default, none may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from casbackup.clock import Clock
from casbackup.fs import FileSystem

ConfigContent = Mapping[str, Any]
"""config.json as parsed."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step works with. ``root`` is the repository's folder, absolute.

    ``advance`` is told how many more things (files, records) are done, for the display of progress.
    """

    root: str
    fs: FileSystem
    clock: Clock
    advance: Callable[[int], None]


def as_before(content: ConfigContent) -> ConfigContent:
    """For steps that change nothing in config.json but the format."""
    return content


@dataclass(frozen=True, slots=True)
class Step:
    """From one format to the next.

    ``change`` does everything but config.json, and can be run again after it was interrupted or finished.
    ``new_config`` is pure: the content of config.json in the new format; the executor sets the number.
    """

    from_format: int
    title: str
    change: Callable[[StepContext], None]
    new_config: Callable[[ConfigContent], ConfigContent] = as_before

    @property
    def to_format(self) -> int:
        return self.from_format + 1
