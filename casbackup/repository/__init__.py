"""A repository in a folder: sessions, snapshots, garbage collection, retention, verification, repair."""
