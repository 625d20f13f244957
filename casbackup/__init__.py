"""casbackup: a deduplicating, content-addressed backup store for virtual machines."""

__version__ = "0.1.0"
