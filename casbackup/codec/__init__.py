"""Bytes to bytes: ids, checksums, compression. No I/O."""
