"""Blobs in packs, found through an LMDB index."""
