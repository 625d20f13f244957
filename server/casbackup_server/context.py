"""What a route needs to know of its request, and the types of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from casbackup.errors import RepositoryNotFound
from casbackup.ids import Namespace, VmName, parse_namespace, parse_vm
from casbackup.spec.wire import ATTACHMENT_HEADER, READING_HEADER
from casbackup_server.rights import Access
from casbackup_server.served import Browsed, Host, Served, Server

_HEX_ID = "^[0-9a-f]{32}$"
_NAME = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"

RepositoryName = Annotated[str, Path(pattern=_NAME, description="The repository's name on this server.")]
SessionPath = Annotated[str, Path(pattern=_HEX_ID, description="The session's id.")]
ReadingPath = Annotated[str, Path(pattern=_HEX_ID, description="The reading's id, which the client chose.")]
Attachment = Annotated[
    str, Header(alias=ATTACHMENT_HEADER, pattern=_HEX_ID, description="Who is attached: a number the client chose.")
]
Readings = Annotated[
    str | None,
    Header(alias=READING_HEADER, max_length=4096, description="The client's readings, with commas between them."),
]
NamespaceQuery = Annotated[str | None, Query(max_length=1100, description="Only of this namespace.")]
VmQuery = Annotated[str | None, Query(max_length=140, description="Only of this VM.")]


@dataclass(frozen=True, slots=True)
class BrowsingContext:
    """A request to look at what one repository holds, admitted."""

    server: Host
    served: Browsed
    access: Access

    def note(self, event: str, **about: object) -> None:
        """A line for the audit log."""
        self.server.audit.note(event, token=self.access.name, repository=self.served.name, **about)


@dataclass(frozen=True, slots=True)
class Context(BrowsingContext):
    """A request of any kind to one repository, admitted."""

    server: Server
    served: Served


async def _browsing(request: Request, repository: RepositoryName) -> BrowsingContext:
    server: Host = request.app.state.server
    address = request.client.host if request.client else ""
    access = server.gate.admit(request.headers.get("authorization"), address, repository)
    request.scope["casbackup.token"] = access.name
    served = server.repositories.get(repository)
    if served is None:
        raise RepositoryNotFound(f"this server has no repository {repository!r}")
    return BrowsingContext(server, served, access)


BrowsingCtx = Annotated[BrowsingContext, Depends(_browsing)]


async def _context(found: BrowsingCtx) -> Context:
    assert isinstance(found.server, Server) and isinstance(found.served, Served)  # other hosts lack these routes
    return Context(found.server, found.served, found.access)


Ctx = Annotated[Context, Depends(_context)]


async def context_of(request: Request, repository: str) -> Context:
    """What ``Ctx`` stands for, where FastAPI is not asked."""
    return await _context(await _browsing(request, repository))


def owner_of(namespace: str | None, vm: str | None) -> tuple[Namespace | None, VmName | None]:
    """:raise InvalidName: when they are none."""
    return (
        None if namespace is None else parse_namespace(namespace),
        None if vm is None else parse_vm(vm),
    )
