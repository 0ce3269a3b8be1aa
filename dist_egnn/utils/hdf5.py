"""HDF5 files: open them on file systems without locks, and tell other causes of an error from damage."""

from __future__ import annotations

import errno
from pathlib import Path

import h5py

from ..errors import Failure
from .filesystem import NO_LOCKS


def open_file(path: Path, mode: str = "r") -> h5py.File:
    """Open a file. Raises OSError, and Failure for a file that another program writes or did not close."""
    try:
        return h5py.File(path, mode)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return h5py.File(path, mode, locking=False)
        if error.errno == errno.EAGAIN:
            raise Failure(f"{path}: another program has it open to write; close it there") from error
        if "h5clear" in str(error):
            remedy = f"end that program, or if it has crashed: h5clear -s {path}"
            raise Failure(f"{path}: was not closed by the program that wrote it; {remedy}") from error
        raise


def read_failure(where: str, error: Exception, remedy: str) -> Failure:
    """The Failure for an error while reading. Data that a filter missing here has compressed are whole."""
    reason = " ".join(str(error).split())
    if "lib/plugin" in reason or "required filter" in reason:
        remedy = "its compression filter is not installed here: set HDF5_PLUGIN_PATH, or write the file with gzip"
    return Failure(f"{where}: cannot be read ({reason}); {remedy}")
