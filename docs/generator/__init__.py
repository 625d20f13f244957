"""The parts of docs/generate.py: what the commands are, and how the pages are made of that."""
