"""Network Block Device: the protocol's numbers, a client and a server."""
