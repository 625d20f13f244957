"""The other side of a job, behind one protocol: a repository in a folder, or (later) a chunk server."""
