"""What a benchmark measured and what it should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from casbackup.units import MiB
from tests.benchmarks.measure import Measured


class _Row(NamedTuple):
    what: str
    seconds: float
    most_seconds: float | None
    cpu_seconds: float | None
    peak_bytes: int | None
    most_bytes: int | None

    @property
    def cells(self) -> list[str]:
        times = f"{self.seconds:.2f} s", f"<= {self.most_seconds:g} s" if self.most_seconds is not None else ""
        cpu = f"{self.cpu_seconds:.2f} s" if self.cpu_seconds is not None else ""
        peak = f"{self.peak_bytes / MiB:.0f} MiB" if self.peak_bytes is not None else ""
        most = f"<= {self.most_bytes / MiB:.0f} MiB" if self.most_bytes is not None else ""
        return [self.what, *times, cpu, peak, most]


@dataclass
class Figures:
    """A table in the making."""

    _rows: list[_Row] = field(default_factory=list)

    def take(
        self, what: str, measured: Measured, most_seconds: float | None = None, most_bytes: int | None = None
    ) -> None:
        """Note a process, and require of it what is given. It is noted first, so the table shows what was missed."""
        self._rows.append(
            _Row(what, measured.seconds, most_seconds, measured.cpu_seconds, measured.peak_bytes, most_bytes)
        )
        assert most_seconds is None or measured.seconds <= most_seconds, f"{what} took {measured.seconds:.2f} s"
        assert most_bytes is None or measured.peak_bytes <= most_bytes, f"{what} took {measured.peak_bytes} bytes"

    def note(self, what: str, seconds: float, most_seconds: float | None = None) -> None:
        """Note a time alone, and require of it what is given."""
        self._rows.append(_Row(what, seconds, most_seconds, None, None, None))
        assert most_seconds is None or seconds <= most_seconds, f"{what}: {seconds:.2f} s"

    def lines(self) -> list[str]:
        """The table in Markdown; nothing when nothing was noted."""
        if not self._rows:
            return []
        head = [["what", "time", "target", "processor", "peak memory", "target"], ["---"] * 6]
        return ["| " + " | ".join(cells) + " |" for cells in [*head, *(row.cells for row in self._rows)]]
