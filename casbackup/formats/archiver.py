"""External archivers: programs that take or give the stream of ``docs/spec/archiver.md`` on a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from casbackup.errors import CasbackupError, Interrupted, TargetClosed, ToolFailed
from casbackup.formats.bytesource import DescriptorSource
from casbackup.formats.child import Child
from casbackup.formats.port import ByteSource, ByteTarget
from casbackup.formats.stream.writer import report_error
from casbackup.formats.target import PipeTarget

NAME = "the archiver"


@contextlib.contextmanager
def archiver_target(command: str) -> Iterator[ByteTarget]:
    """The standard input of a shell's command line. Its standard output is ours.

    An error within the context is reported to it, so that it does not take what it got for all, and it has a few
    seconds to tidy up; an interruption ends it at once. It must end well.

    :raise ToolFailed: when it ends before the stream does, or fails; with the last it said.
    """
    with Child.piped(command, NAME, stdout=None) as child:
        target = PipeTarget(child.input, NAME)
        try:
            yield target
            child.close_input()
        except TargetClosed as error:
            raise ToolFailed(child.ended() or f"{NAME} ended before the stream did") from error
        except Interrupted:
            raise
        except CasbackupError as error:
            if child.is_reading():
                with contextlib.suppress(TargetClosed):
                    report_error(target, str(error))
            child.close_input()
            child.wait()
            raise
        if (failure := child.ended()) is not None:
            raise ToolFailed(failure)


@contextlib.contextmanager
def archiver_source(command: str) -> Iterator[ByteSource]:
    """The standard output of a shell's command line. Reading to its end raises ``ToolFailed`` unless it ended well."""
    with Child.piped(command, NAME, stdin=False) as child:
        yield _ArchiverSource(child)


class _ArchiverSource(DescriptorSource):
    def __init__(self, child: Child) -> None:
        super().__init__(child.output.fileno(), NAME)
        self._child = child

    def read_some(self, buffer: memoryview) -> int:
        got = super().read_some(buffer)
        if buffer and not got and (failure := self._child.ended()) is not None:
            raise ToolFailed(failure)
        return got
