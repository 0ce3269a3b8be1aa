"""The exception for errors that the user can fix: one line that names the file, the key and the remedy."""

from __future__ import annotations


class Failure(Exception):
    """An error that the user can fix. The command line prints its line and exits with 2; --debug adds a traceback."""
