"""Telling people that something went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import structlog

from casbackup_server.jobs.job import Job, JobState

_log = structlog.get_logger("casbackup.jobs")


class Notifier(Protocol):
    def send(self, title: str, text: str) -> None:
        """Never raises: what cannot be sent is in the log. May take a while."""


class NoNotifier:
    """Nobody is to be told."""

    def send(self, title: str, text: str) -> None: ...


class AppriseNotifier:
    """Sends to all of some URLs as apprise understands them."""

    def __init__(self, urls: Sequence[str]) -> None:
        import apprise  # noqa: PLC0415  400 ms that a server without URLs need not pay

        self._apprise = apprise.Apprise()
        for url in urls:
            if not self._apprise.add(url):
                _log.error("not an address that apprise understands", scheme=url.partition(":")[0])

    def send(self, title: str, text: str) -> None:
        if not self._apprise.notify(title=title, body=text):
            _log.error("a notification could not be sent", title=title)


def notifier_for(urls: Sequence[str]) -> Notifier:
    return AppriseNotifier(urls) if urls else NoNotifier()


def report_failure(notifier: Notifier, repository: str, job: Job) -> None:
    """To be told of each job that has ended."""
    if job.state is JobState.FAILED:
        notifier.send(f"casbackup: {job.task} of {repository} failed", job.result)
