"""Files written completely or not at all; folders that one run at a time may work in, and names that one may write to."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Failure


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place at once, on disk for good. Failure if it cannot be written; what stood there then stays."""
    fresh = path.with_name(path.name + ".partial")
    try:
        with open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            fresh.unlink(missing_ok=True)
        raise Failure(f"{path}: cannot be written ({error.strerror}); make room or rights, then go on") from error


@contextmanager
def hold(folder: Path, busy: str, *, first: bool = True) -> Iterator[None]:
    """Hold a folder, made if it is missing, until the block ends or its processes do, however they end.

    Raises Failure(busy) if another holds it. Processes of one run hold it together: those that come after the first, and
    may outlive it for a moment, say ``first=False``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a")  # noqa: SIM115 (closed below; "a" leaves its times alone)
    except OSError as error:
        raise Failure(f"{folder}: cannot be written to ({error.strerror}); choose another folder or mend it") from error
    with file:
        try:
            if first:  # nobody else, shared or not; then shared, so that the others of this run may join
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"{folder}: {busy}") from error
        yield


@contextmanager
def claim(path: Path, busy: str) -> Iterator[None]:
    """Hold the name of a file that is long in the making, by PATH.lock beside it, which is gone afterwards.

    Raises Failure(busy) if another process holds it, however it was started; one that was killed holds nothing.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror}); make room or rights, or choose --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"{path}: {busy}") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
