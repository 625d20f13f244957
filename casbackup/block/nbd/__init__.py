"""Network Block Device: the protocol's numbers and our own client."""
