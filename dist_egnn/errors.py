"""The one exception that users see: a line that names the file, the key and the remedy."""

from __future__ import annotations


class Failure(Exception):
    """Something the user can mend. The command line prints it as one line and exits with 2 (a traceback with --debug)."""
