"""The inventory goes onto shelves."""

from __future__ import annotations

import os

from casbackup_migrations.steps.step import ConfigContent, Step, StepContext


def change(context: StepContext) -> None:
    fs, folder = context.fs, os.path.join(context.root, "inventory")
    for entry in sorted(fs.list(folder)):
        shelf = os.path.join(context.root, "shelves", entry.name[0])
        fs.make_folders(shelf)
        fs.rename(os.path.join(folder, entry.name), os.path.join(shelf, entry.name))
        fs.sync_folder(shelf)
        context.advance(1)
    if fs.exists(folder):
        fs.sync_folder(folder)
    fs.remove_folder(folder)
    fs.sync_folder(context.root)


def new_config(content: ConfigContent) -> ConfigContent:
    return {**content, "compression_level": 5}


STEP = Step(from_format=2, title="put the inventory onto shelves", change=change, new_config=new_config)
