"""One module a command or a few that belong together. Each parses, calls the library, and hands the outcome
to ``Output``.
"""
