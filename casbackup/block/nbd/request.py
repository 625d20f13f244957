"""One request and what has come back for it so far, with the checks that a reply must pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from casbackup.block.nbd.protocol import ERROR_NAMES, MAX_CHUNKS, Command, printable
from casbackup.errors import CasbackupError, NbdProtocolError, NbdRequestFailed
from casbackup.units import MiB

_ZEROS = memoryview(bytes(1 * MiB))


@dataclass(slots=True)
class Request:
    """A command and its range in bytes. ``view``: where a READ puts, or a WRITE takes, ``length`` bytes."""

    command: Command
    offset: int = 0
    length: int = 0
    view: memoryview = field(default_factory=lambda: memoryview(b""))
    flags: int = 0
    status: bytes | None = None
    """BLOCK_STATUS: the descriptors as received."""
    failure: NbdRequestFailed | None = None
    """The first error that the server reported."""
    _chunks: int = 0
    _covered: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        if self.command is Command.FLUSH:
            return self.command.text
        return f"{self.command.text} of {self.length} bytes at {self.offset}"

    def count_chunk(self) -> None:
        """:raise NbdProtocolError: when the reply never comes to an end."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise self.invalid(f"more than {MAX_CHUNKS} chunks")

    def part(self, offset: int, length: int) -> memoryview:
        """The part of the buffer that a chunk of a READ fills. Called once per chunk.

        :raise NbdProtocolError: when it is not within what was asked for.
        """
        if self.command is not Command.READ:
            raise self.invalid("data")
        start = offset - self.offset
        if start < 0 or length <= 0 or start + length > self.length:
            raise self.invalid(f"data for {length} bytes at {offset}")
        self._covered.append((start, start + length))
        return self.view[start : start + length]

    def fill_zeros(self, offset: int, length: int) -> None:
        """:raise NbdProtocolError: as ``part``."""
        part = self.part(offset, length)
        for start in range(0, length, len(_ZEROS)):
            step = min(len(_ZEROS), length - start)
            part[start : start + step] = _ZEROS[:step]

    def fail(self, error: int, text: bytes, peer: str) -> None:
        """Note an error that the server reported; the first one counts."""
        if self.failure is None:
            reason = ERROR_NAMES.get(error, f"error {error}")
            if text:
                reason += f" ({printable(text)})"
            self.failure = NbdRequestFailed(f"{peer}: {self} failed: {reason}", error)

    def finish(self) -> None:
        """The reply has ended. :raise NbdProtocolError: when it was not complete."""
        if self.failure is not None:
            return
        if self.command is Command.READ and not self._is_covered():
            raise self.invalid("data with gaps or overlaps")
        if self.command is Command.BLOCK_STATUS and self.status is None:
            raise self.invalid("no status")

    def invalid(self, what: str) -> CasbackupError:
        """The error for a reply that the protocol does not allow."""
        return NbdProtocolError(f"the NBD server answered the {self} with {what}")

    def _is_covered(self) -> bool:
        position = 0
        for start, end in sorted(self._covered):
            if start != position:
                return False
            position = end
        return position == self.length
