"""A repository on a chunk server as a peer."""
