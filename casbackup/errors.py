"""Every failure that casbackup reports, one class each.

    CasbackupError
     +- UsageError            the request makes no sense as asked
     |   +- InvalidName, DuplicateDisk, InvalidSize, ConfigInvalid
     +- RepositoryError       the repository cannot be used as asked
     |   +- RepositoryNotFound, RepositoryExists, NotARepository, UnsupportedFormat, MigrationNeeded,
     |   +- RepositoryReadOnly, RepositoryBusy, RepositoryFull, NetworkFileSystem, ConfigDamaged
     |   +- IndexMissing, IndexDamaged, IndexIncomplete, IndexFull
     +- SessionError
     |   +- SessionNotFound, SessionBusy, ClosureViolation, CommitOutdated
     +- SnapshotError
     |   +- SnapshotNotFound, SnapshotAmbiguous, SnapshotPinned, SnapshotConflict, VmStateMissing, ManifestDamaged,
     |   +- ManifestForged, SnapshotRolledBack
     +- EncryptionError       the key for something encrypted is missing, wrong or cannot be used
     |   +- KeyMissing, KeyMismatch, KeyFileDamaged, KeyExists, KeyExposed, PassphraseNeeded, PassphraseWrong,
     |   +- DiskSealed
     +- SyncIncomplete        some snapshots could not be copied
     +- DataDamage            stored bytes are not what they should be
     |   +- BlobMissing, BlobDamaged, PackDamaged, NodeInvalid, DamageFound, RestoreIncomplete
     +- SourceError
     |   +- SourceNotFound, SourceUnreadable, SourceChanged, ToolMissing, ToolFailed
     +- TargetError
     |   +- TargetExists, TargetTooSmall, TargetUnsuitable, TargetUnwritable, TargetFull, TargetClosed,
     |   +- DiskInUse, AddressUnusable, MountpointUnusable
     +- ArchiveError          something is wrong with an archive of another format
     |   +- ArchiveUnknown, ArchiveUnsupported, ArchiveLimit, ArchiveDamaged, ArchiveIncomplete,
     |   +- ArchiveLosses, ArchivePluginBroken, ArchiveUnsound, ArchiveUnreadable
     +- NbdError
     |   +- NbdConnectionFailed, NbdProtocolError, NbdRequestFailed
     +- ServerError           a chunk server cannot be reached, or does not do what it is asked
     |   +- ServerUnreachable, ServerBusy, ServerFault, ServerProtocolError, RequestRefused, NeedsFolder,
     |   +- ClockSkewed
     |   +- CertificateUntrusted, TokenMissing, TokenInvalid, RightMissing, SessionDetached, ServerJobNotFound,
     |   +- ServerJobFailed
     +- LiveBackupError       a backup beside a running guest
     |   +- BackupBroken, GuestWriteRefused, SinkLost, BackupJobFailed, BackupJobNotFound, LiveBackupBusy,
     |   +- LiveUnsupported, DiskUnknown, VmStateUnsupported, VmStateFailed
     |   +- QmpError, QmpUnreachable, QmpLost, QmpTimeout, QmpProtocolError, QmpCommandFailed
     |   +- GuestAgentError, GuestAgentUnavailable, GuestAgentFailed
     +- Interrupted

A class carries a stable ``code`` (for ``--json`` and the documentation), the process's ``exit_status``,
whether trying the same again can help (``retryable``) and ``advice``: what the user should do. The message
of an instance says what happened and to which object. ``docs/reference/errors.md`` is generated from here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitStatus(IntEnum):
    """Exit statuses of the ``casbackup`` command. Append-only: a number never changes its meaning."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INCOMPLETE = 3
    DAMAGED = 4
    SOURCE = 5
    TARGET = 6
    NO_SPACE = 7
    NO_REPOSITORY = 10
    BUSY = 11
    NO_KEY = 12
    FORMAT = 13
    NO_SNAPSHOT = 14
    INTERRUPTED = 130
    READER_GONE = 141


EXIT_STATUS_MEANING: dict[ExitStatus, str] = {
    ExitStatus.OK: "everything asked for was done",
    ExitStatus.FAILED: "it failed; the message says why, nothing half-done is visible",
    ExitStatus.USAGE: "the command line or a configuration file is wrong; nothing was done",
    ExitStatus.INCOMPLETE: "done as far as possible, but some data could not be had; the lost ranges are listed",
    ExitStatus.DAMAGED: "damage was found in the repository; what it affects is listed",
    ExitStatus.SOURCE: "a disk or file to back up cannot be read",
    ExitStatus.TARGET: "the place to restore to cannot be used",
    ExitStatus.NO_SPACE: "no space left",
    ExitStatus.NO_REPOSITORY: "there is no repository at that place",
    ExitStatus.BUSY: "somebody else is using it in a way that excludes this",
    ExitStatus.NO_KEY: "the key for this repository is missing or wrong",
    ExitStatus.FORMAT: "the repository has a format that this version cannot use",
    ExitStatus.NO_SNAPSHOT: "no such snapshot, or several match",
    ExitStatus.INTERRUPTED: "stopped by a signal",
    ExitStatus.READER_GONE: "whoever read the output went away: a broken pipe, as a shell shows it",
}


class CasbackupError(Exception):
    """Base of all failures that are reported to a user without a traceback."""

    code: ClassVar[str] = "failed"
    exit_status: ClassVar[ExitStatus] = ExitStatus.FAILED
    retryable: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    @property
    def message(self) -> str:
        return str(self)


class UsageError(CasbackupError):
    """The request makes no sense as asked."""

    code = "usage"
    exit_status = ExitStatus.USAGE
    advice = "See the command's --help."


class InvalidName(UsageError):
    """A name of a VM, disk, namespace, label or config blob is not allowed."""

    code = "invalid-name"
    advice = "Names consist of letters, digits, '.', '_' and '-' and start with a letter, a digit or '_'."


class DuplicateDisk(UsageError):
    """The same disk name was given twice."""

    code = "duplicate-disk"
    advice = "Give every disk of a VM a name of its own."


class InvalidSize(UsageError):
    """A size, duration, percentage or time cannot be understood."""

    code = "invalid-value"
    advice = "Examples: 64MiB, 1.5G, 7d, 10m, 5%, 2026-11-22T20:00:00Z."


class ConfigInvalid(UsageError):
    """A configuration file is wrong, the user's or a server's."""

    code = "config-invalid"
    advice = "Correct the file named in the message, or name another one: CASBACKUP_CONFIG, for a server --config."


class RepositoryError(CasbackupError):
    """The repository cannot be used as asked."""

    code = "repository"


class RepositoryNotFound(RepositoryError):
    """There is nothing at the repository's path."""

    code = "repository-not-found"
    exit_status = ExitStatus.NO_REPOSITORY
    advice = "Check the path (-r, CASBACKUP_REPOSITORY), mount the disk, or create it with `casbackup init`."


class RepositoryExists(RepositoryError):
    """`init` found a repository or other files at the path."""

    code = "repository-exists"
    advice = "Use it as it is, or choose an empty or a new folder."


class NotARepository(RepositoryError):
    """The folder exists but holds no casbackup repository."""

    code = "not-a-repository"
    exit_status = ExitStatus.NO_REPOSITORY
    advice = "Check the path; a repository holds config.json, packs/, snapshots/ and index/."


class ConfigDamaged(RepositoryError):
    """The repository's config.json cannot be read or contradicts itself."""

    code = "repository-config-damaged"
    exit_status = ExitStatus.DAMAGED
    advice = "Restore config.json from its copy config.json.backup in the same folder."


class UnsupportedFormat(RepositoryError):
    """The repository was written by a newer casbackup."""

    code = "unsupported-format"
    exit_status = ExitStatus.FORMAT
    advice = "Use a newer casbackup. Nothing was changed."


class MigrationNeeded(RepositoryError):
    """The repository has an older format that must be migrated first."""

    code = "migration-needed"
    exit_status = ExitStatus.FORMAT
    advice = "Run `casbackup migrate --dry-run`, then `casbackup migrate`."


class RepositoryReadOnly(RepositoryError):
    """The repository cannot be written to."""

    code = "repository-read-only"
    advice = "Check the permissions of the folder and how its file system is mounted."


class RepositoryBusy(RepositoryError):
    """Another process holds a lock that excludes this operation."""

    code = "repository-busy"
    exit_status = ExitStatus.BUSY
    retryable = True
    advice = "Wait for the other operation to end, then try again."


class RepositoryFull(RepositoryError):
    """The file system of the repository is full."""

    code = "repository-full"
    exit_status = ExitStatus.NO_SPACE
    retryable = True
    advice = (
        "Committed snapshots are safe. Free some space on that file system, or `casbackup forget` and `casbackup gc`."
    )


class NetworkFileSystem(RepositoryError):
    """The index would lie on a network file system, where LMDB's locking is not safe."""

    code = "network-file-system"
    advice = "Keep the repository on a local disk."


class IndexMissing(RepositoryError):
    """The index folder is missing or is that of another repository."""

    code = "index-missing"
    exit_status = ExitStatus.DAMAGED
    advice = "Run `casbackup repair --rebuild-index`: it needs nothing but the folder."


class IndexDamaged(RepositoryError):
    """LMDB cannot read the index."""

    code = "index-damaged"
    exit_status = ExitStatus.DAMAGED
    advice = "Run `casbackup repair --rebuild-index`: it needs nothing but the folder."


class IndexIncomplete(RepositoryError):
    """A snapshot needs a blob that the index does not know; nothing may be deleted in that state."""

    code = "index-incomplete"
    exit_status = ExitStatus.DAMAGED
    advice = "Run `casbackup check`, and `casbackup repair --rebuild-index` if packs are there that it does not list."


class IndexFull(RepositoryError):
    """The index cannot grow any further."""

    code = "index-full"
    exit_status = ExitStatus.NO_SPACE
    advice = "Free space on the file system of the repository."


class SessionError(CasbackupError):
    """A backup session cannot go on."""

    code = "session"


class SessionNotFound(SessionError):
    """There is no such session: it was committed, aborted, or given up after its lease ended."""

    code = "session-not-found"
    advice = "Start a new backup; what is already stored is not sent again."


class SessionBusy(SessionError):
    """Another process is working on this session."""

    code = "session-busy"
    exit_status = ExitStatus.BUSY
    retryable = True
    advice = "Wait for the other process, or stop it."


class ClosureViolation(SessionError):
    """A tree node or snapshot names something that is not stored. Refused, nothing was stored."""

    code = "closure-violation"
    advice = "This is a fault of the sending program; please report it."


class CommitOutdated(SessionError):
    """Another snapshot of the VM was made while this one was sealed."""

    code = "commit-outdated"
    retryable = True
    advice = "Run the backup again; `--resume` sends nothing twice."


class SnapshotError(CasbackupError):
    """Something is wrong with a snapshot reference or its manifest."""

    code = "snapshot"
    exit_status = ExitStatus.NO_SNAPSHOT


class SnapshotNotFound(SnapshotError):
    """No snapshot matches."""

    code = "snapshot-not-found"
    advice = "List what is there with `casbackup snapshots`."


class SnapshotAmbiguous(SnapshotError):
    """Several snapshots match."""

    code = "snapshot-ambiguous"
    advice = "Give more of the id or of the time."


class SnapshotPinned(SnapshotError):
    """The snapshot is pinned and stays."""

    code = "snapshot-pinned"
    exit_status = ExitStatus.FAILED
    advice = "Remove the pin with `casbackup pin --remove` first."


class SnapshotConflict(SnapshotError):
    """The VM has another snapshot of the very same time, and times name snapshots."""

    code = "snapshot-conflict"
    exit_status = ExitStatus.FAILED
    advice = "Both are as they were. To copy the other one, forget the one that is in its place."


class VmStateMissing(SnapshotError):
    """The snapshot has disks, but not the memory of the VM."""

    code = "vm-state-missing"
    advice = "Restore the disks and boot from them; `backup --qmp SOCKET --with-vmstate` makes snapshots with memory."


class ManifestDamaged(SnapshotError):
    """A snapshot's manifest file is damaged."""

    code = "manifest-damaged"
    exit_status = ExitStatus.DAMAGED
    advice = "Restore the file from a copy of the repository; the other snapshots are not affected."


class ManifestForged(ManifestDamaged):
    """A snapshot's manifest was not made by anybody who has the repository's key, or was changed since."""

    code = "manifest-forged"
    advice = "Do not trust this snapshot. Find out who can write to the repository; other snapshots are not affected."


class SnapshotRolledBack(SnapshotError):
    """The newest snapshot that this client has seen of a VM is gone, and no newer one is there."""

    code = "snapshot-rolled-back"
    exit_status = ExitStatus.DAMAGED
    advice = (
        "If somebody forgot it on purpose, name the snapshot that you want by its time or id; "
        "otherwise find out who put the repository back to an older state."
    )


class EncryptionError(CasbackupError):
    """A key is missing, wrong or cannot be used."""

    code = "encryption"
    exit_status = ExitStatus.NO_KEY


class KeyMissing(EncryptionError):
    """The key that is needed is not in the key folder; the message names its fingerprint."""

    code = "key-missing"
    advice = "Bring it with `casbackup key import`, from a copy, a recovery sheet or the repository itself."


class KeyMismatch(EncryptionError):
    """Two repositories do not have the same key, or a key is not that of the repository."""

    code = "key-mismatch"
    advice = "Use the key that the message names; `casbackup sync --rekey` copies between repositories of two keys."


class KeyFileDamaged(EncryptionError):
    """A key file is not understood: it was cut off, changed, or is something else."""

    code = "key-file-damaged"
    advice = "Use another copy of the key: a backup of the file, the recovery sheet, or the copy in the repository."


class KeyMistyped(EncryptionError):
    """The text of a recovery sheet has a mistake; the message says in which group of characters."""

    code = "key-mistyped"
    advice = "Compare that group with the sheet, and give all of it once more."


class KeyExists(EncryptionError):
    """There is a key file in that place already."""

    code = "key-exists"
    advice = "A key is never overwritten: move the file away first if it is not needed any more."


class KeyExposed(EncryptionError):
    """Others than its owner can read or change a key file."""

    code = "key-exposed"
    advice = "Take their rights away: chmod 600 for the file, 700 for its folder. Think of who may have read it."


class PassphraseNeeded(EncryptionError):
    """A key is wrapped by a passphrase, and there is nobody to ask for it."""

    code = "passphrase-needed"
    advice = "Set CASBACKUP_PASSPHRASE_FILE or CASBACKUP_PASSPHRASE_COMMAND, or run it on a terminal."


class PassphraseWrong(EncryptionError):
    """The passphrase, or the identity, does not open the key."""

    code = "passphrase-wrong"
    advice = "Try again; the fingerprint in the message says which key it is."


class DiskSealed(EncryptionError):
    """A server cannot give out what is sealed: it has no key."""

    code = "disk-sealed"
    advice = "Restore with the `casbackup` command where the key is, or run `casbackup gateway` there."


class SyncIncomplete(CasbackupError):
    """Some snapshots could not be copied; the others were."""

    code = "sync-incomplete"
    exit_status = ExitStatus.INCOMPLETE
    advice = "The result lists them and why. Run the same command again once that is mended: only they are copied then."


class DataDamage(CasbackupError):
    """Stored bytes are not what they should be."""

    code = "damage"
    exit_status = ExitStatus.DAMAGED


class BlobMissing(DataDamage):
    """A chunk or tree node is not in the repository."""

    code = "blob-missing"
    advice = "Run `casbackup check` to see what is affected; a new backup of the same VM may heal it."


class BlobDamaged(DataDamage):
    """A chunk or tree node fails its checksum."""

    code = "blob-damaged"
    advice = "Run `casbackup check --read-data` to see what is affected; a new backup of the same VM may heal it."


class PackDamaged(DataDamage):
    """A pack file cannot be read as one."""

    code = "pack-damaged"
    advice = "Run `casbackup check --read-data`, then `casbackup repair`."


class NodeInvalid(DataDamage):
    """A tree node's bytes make no sense although its id is right."""

    code = "node-invalid"
    advice = "This is a fault of the program that stored it; please report it."


class DamageFound(DataDamage):
    """A check found damage; the report lists what is affected."""

    code = "damage-found"
    advice = "Back the affected VMs up again (that heals what their disks still hold), then run `casbackup repair`."


class RestoreIncomplete(DataDamage):
    """A best-effort restore had to leave ranges out; they are listed."""

    code = "restore-incomplete"
    exit_status = ExitStatus.INCOMPLETE
    advice = "The listed ranges hold zeros. Everything else was verified."


class SourceError(CasbackupError):
    """A source of a backup cannot be used."""

    code = "source"
    exit_status = ExitStatus.SOURCE


class SourceNotFound(SourceError):
    """The source does not exist."""

    code = "source-not-found"
    advice = "Check the path of the disk."


class SourceUnreadable(SourceError):
    """The source exists but cannot be read."""

    code = "source-unreadable"
    advice = "Check permissions and the health of the storage; no snapshot was made."


class SourceChanged(SourceError):
    """The source changed its size while it was read."""

    code = "source-changed"
    retryable = True
    advice = "Stop what writes to the disk, or back the VM up live; no snapshot was made."


class ToolMissing(SourceError):
    """A program that this needs is not installed."""

    code = "tool-missing"
    advice = "Install what the message names (Debian has it in qemu-utils, lzop, fuse3)."


class ToolFailed(SourceError):
    """An external program failed."""

    code = "tool-failed"
    advice = "Its own message is in the error."


class TargetError(CasbackupError):
    """The place to restore to cannot be used."""

    code = "target"
    exit_status = ExitStatus.TARGET


class TargetExists(TargetError):
    """The target exists and was not overwritten."""

    code = "target-exists"
    advice = "Choose another target, or give --force to overwrite it."


class TargetTooSmall(TargetError):
    """The target device is smaller than the disk."""

    code = "target-too-small"
    advice = "Use a device of at least the disk's size. Nothing was written."


class TargetUnsuitable(TargetError):
    """The target is of the wrong kind, for example a folder where a file is needed."""

    code = "target-unsuitable"
    advice = "See `casbackup restore --help` for what a target can be."


class DiskInUse(TargetError):
    """A disk is used in a way that does not allow writing to it."""

    code = "disk-in-use"
    advice = "End what uses it first."


class AddressUnusable(TargetError):
    """Nothing can listen at an address."""

    code = "address-unusable"
    advice = "Give another address, or end what uses this one."


class MountpointUnusable(TargetError):
    """Nothing can be mounted at a place."""

    code = "mountpoint-unusable"
    advice = "Give an empty folder of yours."


class TargetUnwritable(TargetError):
    """Writing to the target failed."""

    code = "target-unwritable"
    advice = "Check permissions and free space of the target."


class TargetFull(TargetError):
    """The file system of the target is full."""

    code = "target-full"
    exit_status = ExitStatus.NO_SPACE
    advice = "Free space, or choose another target. Nothing half-written is left behind."


class TargetClosed(TargetError):
    """Whoever read what was being written went away: a broken pipe."""

    code = "target-closed"
    exit_status = ExitStatus.READER_GONE
    advice = "The program at the other end of the pipe ended early; see its messages."


class ArchiveError(CasbackupError):
    """Something is wrong with an archive of another format."""

    code = "archive"


class ArchiveUnknown(ArchiveError):
    """The file or stream is in no archive format that casbackup knows."""

    code = "archive-unknown"
    exit_status = ExitStatus.SOURCE
    advice = "See `casbackup archive formats`; a disk image is backed up with `casbackup backup`."


class ArchiveUnsupported(ArchiveError):
    """The archive is of a variant that cannot be read or written, or not on a pipe."""

    code = "archive-unsupported"
    exit_status = ExitStatus.SOURCE
    advice = "See the format's page in the documentation for what is supported."


class ArchiveLimit(ArchiveError):
    """The format cannot hold this snapshot; nothing was written."""

    code = "archive-limit"
    exit_status = ExitStatus.USAGE
    advice = "Choose another format, or leave disks out with --disk."


class ArchiveDamaged(ArchiveError):
    """The archive contradicts itself, fails a checksum, or ends too early."""

    code = "archive-damaged"
    exit_status = ExitStatus.DAMAGED
    advice = "`casbackup archive verify` lists all that is wrong, `casbackup archive salvage` rescues what is intact."


class ArchiveIncomplete(ArchiveError):
    """The archive lacks parts of its disks."""

    code = "archive-incomplete"
    exit_status = ExitStatus.INCOMPLETE
    advice = "`--allow-incomplete` takes what is there and records what is missing."


class ArchiveLosses(ArchiveError):
    """What was asked for was done with an archive that lacks parts of its disks; they are zeros now."""

    code = "archive-losses"
    exit_status = ExitStatus.INCOMPLETE
    advice = "What was missing is listed; `show --json` lists it for a snapshot."


class ArchivePluginBroken(ArchiveError):
    """An installed plugin for an archive format cannot be loaded or fails at the first call."""

    code = "archive-plugin-broken"
    advice = "Update or remove the package named in the message; the other formats work without it."


class ArchiveUnsound(ArchiveError):
    """`archive verify` found something wrong; it is listed."""

    code = "archive-unsound"
    advice = "`casbackup archive salvage` rescues what is intact."


class ArchiveUnreadable(ArchiveError):
    """`archive verify` could not read the file as an archive at all, so it says nothing about its content."""

    code = "archive-unreadable"
    exit_status = ExitStatus.USAGE
    advice = "Check that it is the right file; `--format` says what it is if its beginning does not."


class NbdError(CasbackupError):
    """Talking to an NBD server failed."""

    code = "nbd"
    exit_status = ExitStatus.SOURCE


class NbdConnectionFailed(NbdError):
    """The NBD server cannot be reached or refused the export."""

    code = "nbd-connection-failed"
    retryable = True
    advice = "Check that the server runs and that it has an export of that name."


class NbdProtocolError(NbdError):
    """The NBD server said something that the protocol does not allow."""

    code = "nbd-protocol"
    advice = "Check that the other side is an NBD server (fixed newstyle)."


class NbdRequestFailed(NbdError):
    """The NBD server answered a request with an error."""

    code = "nbd-request-failed"
    advice = "See the server's log; the storage behind it may be failing."

    def __init__(self, message: str, number: int = 0) -> None:
        """``number``: the protocol's of the error."""
        super().__init__(message)
        self.number = number


class ServerError(CasbackupError):
    """A chunk server cannot be reached, or does not do what it is asked."""

    code = "server"


class ServerUnreachable(ServerError):
    """There was no connection to the server, or it broke, and trying again did not help."""

    code = "server-unreachable"
    retryable = True
    advice = (
        "Check the address, that `casbackup serve` runs there, and what is between: network, firewall, certificate."
    )


class CertificateUntrusted(ServerError):
    """The server's certificate is not that of its address, has expired, or nobody who is trusted vouches for it."""

    code = "certificate-untrusted"
    advice = (
        "If the server is yours, name its certificate, or that of its authority, by --cacert, CASBACKUP_CACERT or"
        " `cacert` in the profile, and use an address that stands in it. Otherwise somebody may be in between."
    )


class ServerBusy(ServerError):
    """The server has too much to do, or answers this client no more for a while."""

    code = "server-busy"
    exit_status = ExitStatus.BUSY
    retryable = True
    advice = "Try again later; ask the server's administrator if it stays so."


class ServerFault(ServerError):
    """The server met an error that it did not expect: a bug, or a failing machine."""

    code = "server-fault"
    advice = "The server's log has more; please report it if it is a bug."


class ServerProtocolError(ServerError):
    """What came is not what a casbackup server or client sends."""

    code = "server-protocol"
    advice = "Check that the address is that of a casbackup server, and that both sides have versions that go together."


class RequestRefused(ServerError):
    """A request exceeds a limit of the server, or came too slowly."""

    code = "request-refused"
    advice = "The limits stand in docs/reference/limits.md; a casbackup client keeps them."


class ClockSkewed(ServerError):
    """The client's clock differs too much from the server's for a sealed snapshot, whose time a server cannot set."""

    code = "clock-skewed"
    advice = "Set the client's clock, for example with NTP."


class NeedsFolder(ServerError):
    """The command works on the repository's folder, which a server does not hand out."""

    code = "needs-folder"
    exit_status = ExitStatus.USAGE
    advice = (
        "Run it on the server, with -r and the path of the repository's folder. A server's own gc, check and forget are"
        " started from afar with `casbackup server-job start`."
    )


class TokenMissing(ServerError):
    """The server wants a token and was given none."""

    code = "token-missing"
    advice = (
        "Ask the server's administrator for a token (`casbackup token create`) and give it by CASBACKUP_TOKEN, "
        "CASBACKUP_TOKEN_FILE, CASBACKUP_TOKEN_COMMAND or the profile."
    )


class TokenInvalid(ServerError):
    """The server does not know the token: it is wrong, has expired or was revoked."""

    code = "token-invalid"
    advice = "Ask the server's administrator for a new token (`casbackup token create` or `token rotate`)."


class RightMissing(ServerError):
    """The token does not permit this."""

    code = "right-missing"
    advice = "Ask the server's administrator for a token with the right that the message names."


class SessionDetached(ServerError):
    """The session is not attached to this server process: it was restarted, or heard nothing of the client for long."""

    code = "session-detached"
    retryable = True
    advice = "Resume the session; a casbackup client does so by itself."


class ServerJobNotFound(ServerError):
    """The server knows no job with this id; it remembers only the latest ones."""

    code = "server-job-not-found"
    advice = "List what there is with `casbackup server-job list`."


class ServerJobFailed(ServerError):
    """A job of the server did not succeed."""

    code = "server-job-failed"
    advice = "`casbackup server-job log` shows what it wrote down."


class LiveBackupError(CasbackupError):
    """Something went wrong between a running guest and its backup."""

    code = "live-backup"
    exit_status = ExitStatus.SOURCE


class BackupBroken(LiveBackupError):
    """The backup was given up so that the guest could go on."""

    code = "backup-broken"
    retryable = True
    advice = "The guest was not affected. See why the target is slow or failed, or give --max-guest-stall more time."


class GuestWriteRefused(LiveBackupError):
    """A guest's write failed because the old data could not be saved first, and the policy puts the backup first."""

    code = "guest-write-refused"
    advice = "Nothing was overwritten. End the backup, or let it break instead (break-backup)."


class SinkLost(LiveBackupError):
    """The process that takes the guest's data has died."""

    code = "sink-lost"
    retryable = True
    advice = "Writes of the guest were answered in its place and the backup was ended. See the system's log for why."


class BackupJobFailed(LiveBackupError):
    """A backup job inside QEMU ended with an error."""

    code = "backup-job-failed"
    retryable = True
    advice = "The message is QEMU's own. The dirty bitmaps of earlier backups are as they were."


class BackupJobNotFound(LiveBackupError):
    """No backup of that name is running here."""

    code = "backup-job-not-found"
    exit_status = ExitStatus.USAGE
    advice = "`casbackup job list` shows what is running; only its own user sees a job."


class LiveBackupBusy(LiveBackupError):
    """The VM is being backed up already."""

    code = "live-backup-busy"
    exit_status = ExitStatus.BUSY
    retryable = True
    advice = "Wait for the other backup to end; `casbackup job list` shows those of this machine."


class LiveUnsupported(LiveBackupError):
    """This QEMU cannot do what was asked for."""

    code = "live-unsupported"
    exit_status = ExitStatus.USAGE
    advice = "See docs/how-to/live-backup.md for what needs which version of QEMU."


class DiskUnknown(LiveBackupError):
    """The VM has no disk that was named, or none at all to back up."""

    code = "disk-unknown"
    exit_status = ExitStatus.USAGE
    advice = "The message lists the disks that the VM has."


class VmStateUnsupported(LiveBackupError):
    """The memory of this VM cannot be saved, or not in the way that was asked for."""

    code = "vm-state-unsupported"
    exit_status = ExitStatus.USAGE
    advice = "See docs/how-to/vm-state.md for what QEMU and its host must be able to do; or leave the memory out."


class VmStateFailed(LiveBackupError):
    """QEMU did not manage to save the memory of the VM."""

    code = "vm-state-failed"
    retryable = True
    advice = "The message is QEMU's own. The guest goes on, and no snapshot was made."


class QmpError(LiveBackupError):
    """Talking to QEMU's monitor (QMP) failed."""

    code = "qmp"


class QmpUnreachable(QmpError):
    """There is no QMP monitor at the socket, or it is busy with another client."""

    code = "qmp-unreachable"
    retryable = True
    advice = "Check the path. A QMP socket serves one client at a time: give the VM a second one for backups."


class QmpLost(QmpError):
    """The connection to QMP ended: QEMU has quit or crashed."""

    code = "qmp-lost"
    advice = "See QEMU's log. No snapshot was made."


class QmpTimeout(QmpError):
    """QEMU did not answer a command in time."""

    code = "qmp-timeout"
    retryable = True
    advice = "QEMU may be waiting for a slow disk or network storage."


class QmpProtocolError(QmpError):
    """What came is not QMP."""

    code = "qmp-protocol"
    advice = "Check that the socket is that of a monitor in control mode (-qmp), not of a human one or of the agent."


class QmpCommandFailed(QmpError):
    """QEMU refused a command."""

    code = "qmp-command-failed"
    advice = "The message is QEMU's own."


class GuestAgentError(LiveBackupError):
    """The guest's agent does not do what it is asked."""

    code = "guest-agent"


class GuestAgentUnavailable(GuestAgentError):
    """The guest's agent does not answer."""

    code = "guest-agent-unavailable"
    retryable = True
    advice = "Start qemu-guest-agent in the guest, or give --freeze never for a crash-consistent backup."


class GuestAgentFailed(GuestAgentError):
    """The guest's agent reported an error."""

    code = "guest-agent-failed"
    advice = "The message is the agent's own; its freeze hooks may have failed."


class Interrupted(CasbackupError):
    """Stopped by a signal; what was already stored stays usable for the next run."""

    code = "interrupted"
    exit_status = ExitStatus.INTERRUPTED
    advice = "Run the same command again: what was stored is not sent again."


def catalogue() -> list[type[CasbackupError]]:
    """All error classes, base first, in the order of their definition."""
    found: list[type[CasbackupError]] = []

    def visit(cls: type[CasbackupError]) -> None:
        found.append(cls)
        for child in cls.__subclasses__():
            visit(child)

    visit(CasbackupError)
    return found
