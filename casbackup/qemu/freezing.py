"""Freezing the guest's file systems around the point in time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from casbackup.errors import GuestAgentError, GuestAgentUnavailable
from casbackup.qemu.agent import GuestAgent
from casbackup.qemu.source import FreezePolicy, Instant, Report

Announce = Callable[[str | None], None]
"""Told the agent's socket before the guest is frozen, None when it is thawed."""


@contextlib.contextmanager
def frozen_guest(policy: FreezePolicy, agent_path: str | None, announce: Announce, report: Report) -> Iterator[Instant]:
    """While entered the guest is frozen, as far as the policy demands and the agent obeys.

    :raise GuestAgentError: when it must be frozen and is not.
    """
    if policy is FreezePolicy.NEVER:
        yield Instant(False, "not asked for")
        return
    try:
        agent = _agent(agent_path)
    except GuestAgentError as error:
        if policy is FreezePolicy.REQUIRE:
            raise
        yield Instant(False, error.message)
        return
    with agent:
        announce(agent_path)
        try:
            yield _freeze(agent, policy)
        finally:
            _thaw(agent, report)
            announce(None)


def _agent(path: str | None) -> GuestAgent:
    if path is None:
        raise GuestAgentUnavailable("the VM has no guest agent that we know of")
    return GuestAgent(path)


def _freeze(agent: GuestAgent, policy: FreezePolicy) -> Instant:
    try:
        agent.freeze()
    except GuestAgentError as error:
        if policy is FreezePolicy.REQUIRE:
            raise
        return Instant(False, error.message)
    return Instant(True)


def _thaw(agent: GuestAgent, report: Report) -> None:
    """Also after a freeze that failed: it may have been half done, or come late."""
    try:
        agent.thaw()
    except GuestAgentError as error:
        report(f"the guest may still be frozen: {error.message}")
