"""The inventory becomes JSON."""

from __future__ import annotations

import json
import os

from casbackup.fs import write_durably
from casbackup_migrations.steps.step import Step, StepContext


def change(context: StepContext) -> None:
    fs, folder = context.fs, os.path.join(context.root, "inventory")
    for entry in sorted(fs.list(folder)):
        path = os.path.join(folder, entry.name)
        if entry.name.endswith(".tmp"):
            fs.remove(path)
        elif entry.name.endswith(".txt"):
            lines = fs.read(path).decode().splitlines()
            content = dict(line.split("=", 1) for line in lines)
            write_durably(fs, path.removesuffix(".txt") + ".json", json.dumps(content).encode(), replace=True)
            fs.remove(path)
            context.advance(1)
    if fs.exists(folder):
        fs.sync_folder(folder)


STEP = Step(from_format=1, title="turn the inventory into JSON", change=change)
