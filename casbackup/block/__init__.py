"""Block devices: the port, its implementations, filters to put on them, and how they are opened and served.

``device`` is the port, ``guard`` the one place that checks calls; ``rawfile``, ``memory``, ``sparse``,
``nbd.client`` and ``qemu_nbd`` implement it, ``align`` and ``filters`` stand on others. ``nbd.server`` serves
any device; ``spool`` and ``sink`` take what a live backup is given, and ``proxy`` is a disk that one can be
taken of. ``source``, ``target`` and ``qemu_target`` are the front doors. Nothing here knows of repositories.
"""
