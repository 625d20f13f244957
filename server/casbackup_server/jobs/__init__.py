"""Work that a server does on its repositories by itself: gc, check, forget, sync."""
