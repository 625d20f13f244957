"""casbackup's own stream of an archive: what external archivers speak (``docs/spec/archiver.md``)."""

from casbackup.formats.port import ArchiveFormat
from casbackup.formats.stream.reader import StreamReader
from casbackup.formats.stream.writer import StreamWriter
from casbackup.spec.archiver import MAGIC

FORMAT = ArchiveFormat(
    name="stream",
    summary="casbackup's own stream, for pipes and external archivers",
    suffixes=(".casarch",),
    recognises=lambda first: first.startswith(MAGIC),
    reader=StreamReader,
    writer=StreamWriter,
)
