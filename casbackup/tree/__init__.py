"""Disk trees: building them, reading any byte range through them, telling two apart. Needs no store: nodes come in as
bytes.
"""
