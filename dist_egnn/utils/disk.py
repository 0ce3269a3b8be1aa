"""A disk that is full: told of before, or in one line, and never by a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import Failure

FULL = (errno.ENOSPC, errno.EDQUOT)


def check_room(path: Path, need: int, *, own: int = 0) -> None:
    """Failure unless ``need`` bytes fit on the disk of PATH, whose folder exists; own: bytes there that will be given back."""
    free = shutil.disk_usage(path.parent).free + own
    if free < need:
        raise Failure(
            f"{path}: disk full: needs {need / 1e6:,.2f} MB or more, {free / 1e6:,.2f} MB are free; "
            "make room there, or choose another place"
        )


def reason(error: OSError, path: Path) -> str:
    """What stopped the work that writes PATH: the file, why, and of a full disk how much of it is free."""
    why = " ".join((error.strerror or str(error)).split())
    if error.errno in FULL:
        why += f", {shutil.disk_usage(path.parent).free / 1e6:,.2f} MB are free"
    return f"{error.filename2 or error.filename or path}: {why}"


def save(path: Path, need: int, write: Callable[[str], object]) -> None:
    """write(path), by a library that does not notice when the last bytes of a file of about ``need`` find no place.

    Raises Failure or OSError unless they did.
    """
    check_room(path, need)
    try:
        write(str(path))
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise Failure(f"{path}: cannot be written ({line}); is the disk full?") from error
    with path.open("r+b") as file:  # had they not, there would be no place for more either
        end = file.seek(0, os.SEEK_END)
        file.write(bytes(1 << 16))
        file.flush()
        file.truncate(end)


class Sink(io.FileIO):
    """A file for HDF5 to write, of which it never hears an error. shown: the name that errors tell.

    HDF5 crashes the process if a write fails as it closes a file. So the first error is kept, what comes after it is dropped,
    and ``check`` raises it. Raises Failure while another process writes the file.
    """

    def __init__(self, path: Path, shown: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        self.path, self.shown = path, shown
        self.error: OSError | None = None
        self.end = 0  # bytes that the file would have
        with contextlib.suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise Failure(f"{path}: another process is writing it; wait for that one, or end it") from None
        super().truncate(0)

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        self.end = max(self.end, self.tell() + size)
        try:
            while self.error is None and rest:
                rest = rest[super().write(rest) :]  # a disk that is nearly full takes a part
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return 0

    def check(self) -> None:
        """Failure if something could not be written so far."""
        if self.error is None:
            return
        if self.error.errno in FULL:
            check_room(self.shown, self.end, own=self.path.stat().st_blocks * 512)
        raise Failure(f"{reason(self.error, self.shown)}; mend that, or choose another place") from self.error
