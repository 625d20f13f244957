"""The ``casbackup`` command line: parses what was asked, calls the library, shows the outcome."""
