"""The server's configuration file (TOML).

    listen = "0.0.0.0:8007"
    audit-log = "/var/log/casbackup/audit.jsonl"

    [tls]
    cert = "/etc/casbackup/server.pem"
    key = "/etc/casbackup/server.key"

    [repositories.main]
    path = "/backup/vms"
    retention = { daily = 7, weekly = 4 }
    max-age = { "vm/*" = "26h" }

    [repositories.main.tasks.nightly-check]
    kind = "check"
    cron = "0 4 * * *"
    time-budget = "1h"

    [repositories.main.tasks.offsite]
    kind = "sync"
    cron = "30 5 * * *"
    to = "https://offsite.example.com:8007/main"
    token-file = "/etc/casbackup/offsite.token"

    [notify]
    urls = ["mailto://user:password@example.com"]

Options of ``casbackup serve`` come before what the file says. Relative paths start at the file's folder.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from casbackup.errors import CasbackupError, ConfigInvalid, UsageError
from casbackup.peer.http.address import parse_repository_name


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _resolved(path: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder", "")
    return os.path.join(folder, os.path.expanduser(path))


PathText = Annotated[str, Field(min_length=1), AfterValidator(_resolved)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=_kebab, populate_by_name=True)


class TlsSettings(_Table):
    """PEM files: the certificate with its chain, and its key."""

    cert: PathText
    key: PathText


class RetentionSettings(_Table):
    """How many snapshots, or periods with one, are kept of each VM."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0


class TaskSettings(_Table):
    """``cron``: five fields; without it, the task is only done when asked for. The other keys belong to a kind each:
    ``read_data`` and ``time_budget`` to check, the rest to sync.
    """

    kind: Literal["gc", "check", "forget", "sync"]
    cron: str | None = None
    read_data: bool = False
    time_budget: str | None = None
    to: str | None = None
    source: Annotated[str | None, Field(alias="from")] = None
    token_file: PathText | None = None
    cacert: PathText | None = None
    patience: str | None = None
    vms: list[str] = []
    last: Annotated[int | None, Field(ge=1)] = None
    mirror: bool = False


class RepositorySettings(_Table):
    """``path``: the repository's folder. ``max_age``: by patterns of VMs, how old their latest snapshot may become."""

    path: PathText
    retention: RetentionSettings | None = None
    tasks: dict[str, TaskSettings] = {}
    max_age: dict[str, str] = {}


class NotifySettings(_Table):
    """``urls``: where apprise sends what went wrong."""

    urls: list[str] = []


class Settings(_Table):
    """All of it. ``stop_grace``: how long requests may go on after SIGTERM. ``server``: what speaks HTTP."""

    listen: str = "127.0.0.1:8007"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    insecure_no_auth: bool = False
    audit_log: PathText | None = None
    metrics_token_file: PathText | None = None
    timezone: str = "UTC"
    stop_grace: str = "30s"
    server: Literal["uvicorn", "granian"] = "uvicorn"
    tls: TlsSettings | None = None
    notify: NotifySettings = NotifySettings()
    repositories: dict[str, RepositorySettings] = {}


def read_settings(path: str | None) -> Settings:
    """The file's; without one, what holds if nothing is said.

    :raise ConfigInvalid: when it cannot be read, is not TOML, or holds what it should not.
    """
    if path is None:
        return Settings()
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} is not understood: {error}") from error
    try:
        settings = Settings.model_validate(content, context={"folder": os.path.dirname(os.path.abspath(path))})
        for name in settings.repositories:
            parse_repository_name(name)
    except ValidationError as error:
        raise ConfigInvalid(f"{path}: {_first(error)}") from error
    except CasbackupError as error:
        raise ConfigInvalid(f"{path}: {error}") from error
    return settings


def with_options(
    settings: Settings,
    *,
    listen: str | None,
    repositories: Mapping[str, str],
    tls_cert: str | None,
    tls_key: str | None,
    insecure_no_auth: bool,
    server: Literal["uvicorn", "granian"] | None = None,
) -> Settings:
    """The settings with what the command line says. Repositories are added to those of the file.

    :raise UsageError: when something is missing.
    """
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    changes: dict[str, object] = {
        "repositories": {
            **settings.repositories,
            **{name: RepositorySettings(path=path) for name, path in repositories.items()},
        }
    }
    if listen is not None:
        changes["listen"] = listen
    if tls_cert is not None and tls_key is not None:
        changes["tls"] = TlsSettings(cert=tls_cert, key=tls_key)
    if insecure_no_auth:
        changes["insecure_no_auth"] = True
    if server is not None:
        changes["server"] = server
    changed = settings.model_copy(update=changes)
    if not changed.repositories:
        raise UsageError("there is nothing to serve: give --repository NAME=PATH, or a --config with repositories")
    return changed


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}" if place else str(found["msg"])
