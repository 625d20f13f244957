"""Byte layouts of everything that is persisted or sent; one module per page in ``docs/spec/``."""
