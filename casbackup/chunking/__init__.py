"""Cutting a segment into chunks."""
