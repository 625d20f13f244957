"""Migrates the repository named on the command line; run as a process of its own, to be killed."""

from __future__ import annotations

import sys

import sample_steps

from casbackup.clock import SystemClock
from casbackup.fs import RealFileSystem
from casbackup_migrations.execute import execute_migration
from casbackup_migrations.registry import Registry, discover

if __name__ == "__main__":
    print("ready", flush=True)
    known = Registry(discover(sample_steps), 3)
    execute_migration(sys.argv[1], RealFileSystem(), SystemClock(), registry=known)
    print("done", flush=True)
