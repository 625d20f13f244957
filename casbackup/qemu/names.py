"""What we call things in a QEMU."""

PREFIX = "casbackup-"
"""Jobs, nodes and exports of ours begin with it, and those of one backup with its name, which does so, too."""
