"""What tests of casbackup, and of parts written for it, build on: conformance suites and stand-ins."""
