"""The jobs of a repository, remembered: one file each in its folder ``jobs``, the oldest removed.

Files, not the index: an index can be rebuilt from the packs, a history of jobs cannot.
"""

from __future__ import annotations

import os
import threading

from casbackup.fs import FileSystem, RealFileSystem, write_durably
from casbackup.limits import MAX_SERVER_JOBS_KEPT
from casbackup_server.jobs.job import Job, decode_job, encode_job

_SUFFIX = ".json"


class JobHistory:
    """Safe from several threads. Of one server process: what another one does is not seen."""

    def __init__(self, root: str, *, fs: FileSystem | None = None, most: int = MAX_SERVER_JOBS_KEPT) -> None:
        self._folder = os.path.join(os.path.abspath(root), "jobs")
        self._fs = fs or RealFileSystem()
        self._most = most
        self._lock = threading.Lock()
        self._jobs = self._read()

    def all(self) -> list[Job]:
        """The newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (job.created_ms, job.id), reverse=True)

    def get(self, job_id: str) -> Job | None:
        with self._lock:
            return self._jobs.get(job_id)

    def put(self, job: Job) -> None:
        """Durable on return."""
        with self._lock:
            self._fs.make_folders(self._folder)
            write_durably(self._fs, self._path(job.id), encode_job(job), replace=True)
            self._jobs[job.id] = job
            over = sorted((j for j in self._jobs.values() if j.state.is_over), key=lambda j: j.created_ms)
            for old in over[: max(0, len(self._jobs) - self._most)]:
                del self._jobs[old.id]
                self._fs.remove(self._path(old.id))

    def _path(self, job_id: str) -> str:
        return os.path.join(self._folder, job_id + _SUFFIX)

    def _read(self) -> dict[str, Job]:
        if not self._fs.exists(self._folder):
            return {}
        names = [entry.name for entry in self._fs.list(self._folder) if entry.name.endswith(_SUFFIX)]
        found = [decode_job(self._fs.read(os.path.join(self._folder, name))) for name in names]
        return {job.id: job for job in found if job is not None}
