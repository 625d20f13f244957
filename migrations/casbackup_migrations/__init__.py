"""Upgrades of a repository from one format version to the next."""
