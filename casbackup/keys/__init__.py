"""Master keys where people keep them: in key files, in a folder, on paper."""
