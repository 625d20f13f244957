"""Block devices: the port, its implementations, and how to open what a backup reads or a restore writes.

``device`` is the port, ``guard`` the one place that checks calls; ``rawfile``, ``memory``, ``nbd.client`` and
``qemu_nbd`` implement it, ``align`` is a filter; ``source``, ``target`` and ``qemu_target`` are the front
doors. Nothing here knows of repositories.
"""
