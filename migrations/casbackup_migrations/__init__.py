"""Upgrades of a repository from one format version to the next: ``plan_migration``, ``execute_migration``.

``steps/`` holds one frozen module per change of the format, ``registry`` finds them, ``plan`` says what
would be done, ``execute`` does it (its docstring has the write order and what a crash leaves).
"""
