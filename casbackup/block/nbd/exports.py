"""What an NBD server offers: devices under names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from casbackup.block.device import BlockDevice
from casbackup.block.nbd.protocol import MAX_EXPORT_NAME_BYTES
from casbackup.errors import UsageError


class Receiver(Protocol):
    """A device that takes written data without its being copied, and never refuses it."""

    def room(self, length: int) -> memoryview:
        """Where the next ``length`` bytes, at most 1 MiB, are to be received."""

    def receive(self, offset: int, room: memoryview) -> None:
        """They are there, and belong at ``offset``. Takes the room over; raises nothing."""

    def give_back(self, room: memoryview) -> None:
        """They will not come."""

    def refuse(self, reason: str) -> None:
        """The writer asked for what it may not; it is told that all went well, and the data is lost."""


class Export:
    """A name and how its device is opened: for the first connection, shared by all, closed after the last."""

    def __init__(
        self,
        name: str,
        opened: Callable[[], BlockDevice],
        *,
        description: str = "",
        receiver: Receiver | None = None,
        owned: bool = True,
    ) -> None:
        """``opened`` gives a guarded device, and is called again when nobody had it open for a while.

        ``receiver``: takes the data of writes in place of the device. ``owned``: whether to close the device.

        :raise UsageError: when the name or description is too long.
        """
        self.name = name
        self.description = description
        self.receiver = receiver
        if max(len(self.encoded_name), len(description.encode())) > MAX_EXPORT_NAME_BYTES:
            raise UsageError(f"the name and description of an export have at most {MAX_EXPORT_NAME_BYTES} bytes")
        self._opened = opened
        self._owned = owned
        self._device: BlockDevice | None = None
        self._connections = 0
        self._changed = threading.Condition()

    @classmethod
    def of(cls, name: str, device: BlockDevice, *, description: str = "", receiver: Receiver | None = None) -> Export:
        """An export of a device that is open already and stays the caller's. Errors as the constructor."""
        return cls(name, lambda: device, description=description, receiver=receiver, owned=False)

    @property
    def encoded_name(self) -> bytes:
        return self.name.encode("utf-8", "surrogateescape")

    def acquire(self) -> BlockDevice:
        """The device, for one more connection. Errors are those of opening it."""
        with self._changed:
            if self._device is None:
                self._device = self._opened()
            self._connections += 1
            return self._device

    def release(self) -> None:
        """The connection is over. What closing the device raises, is raised."""
        with self._changed:
            self._connections -= 1
            device = self._device
            try:
                if not self._connections and device is not None:
                    self._device = None
                    if self._owned:
                        device.close()
            finally:
                self._changed.notify_all()

    def wait_unused(self, timeout_s: float) -> bool:
        """Wait until no connection uses it; whether that came to pass in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._connections, timeout_s)
