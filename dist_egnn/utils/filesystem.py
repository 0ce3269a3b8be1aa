"""Files that are written completely or not at all, free-space checks, locks on folders and on output files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import Failure

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524)  # of a file system; 524: Linux's ENOTSUPP
BUSY = "another process is writing it; wait for it, or choose another path"


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file: write ``content`` beside it, flush it to disk, rename it. Readers see old or new. Raises OSError."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """`replace_file` that raises Failure in place of OSError; the existing file is then unchanged."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror}); free disk space or fix permissions") from error


def check_free_space(path: Path, needed: int, *, reusable: int = 0) -> None:
    """Raise Failure unless ``needed`` bytes fit on the disk of ``path``, where the new content replaces ``reusable``."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free + reusable
    if free < needed:
        sizes = f"needs {needed / 1e6:,.2f} MB or more, {free / 1e6:,.2f} MB are free"
        raise Failure(f"{path}: disk full: {sizes}; free disk space or choose another path")


def describe_os_error(error: OSError, path: Path) -> str:
    """One line for an error while writing ``path``: the file, the reason and, if the disk is full, the free space."""
    reason = " ".join((error.strerror or str(error)).split())
    if error.errno in DISK_FULL:
        reason += f", {shutil.disk_usage(path.parent).free / 1e6:,.2f} MB are free"
    return f"{error.filename2 or error.filename or path}: {reason}"


def save_verified(path: Path, size: int, save: Callable[[str], object]) -> None:
    """Call save(str(path)), which may ignore errors as DGL does, and verify that the file reached the disk, else raise."""
    check_free_space(path, size)
    try:
        save(str(path))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Failure(f"{path}: cannot be written ({reason}); is the disk full?") from error
    with path.open("r+b") as file:  # if the last bytes did not fit, more bytes do not fit either
        end = file.seek(0, os.SEEK_END)
        file.write(bytes(1 << 16))
        file.flush()
        file.truncate(end)


class DeferredErrorFile(io.FileIO):
    """A file object for HDF5, which crashes if a write fails while it closes a file; `check` raises the first error.

    Data after the error are discarded. display_path: for messages.
    """

    def __init__(self, path: Path, display_path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), "r+")
        self.path, self.display_path = path, display_path
        self.error: OSError | None = None
        self.end = 0  # size of the complete file in bytes

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        self.end = max(self.end, self.tell() + size)
        try:
            while self.error is None and rest:
                rest = rest[super().write(rest) :]  # a nearly full disk accepts a part
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
        """Raise Failure if any write failed so far."""
        if self.error is None:
            return
        if self.error.errno in DISK_FULL:
            check_free_space(self.display_path, self.end, reusable=self.path.stat().st_blocks * 512)
        raise Failure(f"{describe_os_error(self.error, self.display_path)}; choose another path") from self.error


def _alive(owner: str) -> bool:
    """Whether the process "HOST PID" may still run: always true for another host."""
    host, _, pid = owner.rpartition(" ")
    if host != platform.node():
        return True
    with suppress(ValueError, PermissionError):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
    return True


@contextmanager
def _owned(lock: Path, path: Path, busy: str) -> Iterator[None]:
    """In place of a lock, where the file system has none: LOCK.owner, which names the process that created it."""
    owner = lock.with_name(lock.name + ".owner")
    if owner.is_file() and not _alive(text := owner.read_text(encoding="utf-8")):  # left by a killed process
        owner.unlink(missing_ok=True)
    try:
        with owner.open("x", encoding="utf-8") as file:
            file.write(f"{platform.node()} {os.getpid()}")
    except FileExistsError:
        text = owner.read_text(encoding="utf-8")
        raise Failure(f"{path}: {busy} (host and process {text}; if it has ended: rm {owner})") from None
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)


@contextmanager
def _locked(lock: Path, path: Path, busy: str, *operations: int, remove: bool = False) -> Iterator[None]:
    """Lock a file until the block ends or the process dies. remove: delete it afterwards."""
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            while True:
                # "a" keeps the modification time of the content
                file = stack.enter_context(lock.open("a", encoding="utf-8"))
                for operation in operations:
                    fcntl.flock(file, operation | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                        break  # else the process that had the lock removed the file meanwhile
        except BlockingIOError as error:
            raise Failure(f"{path}: {busy}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise Failure(f"{path}: cannot be written ({error.strerror}); choose another path") from error
            if fcntl.LOCK_EX in operations:  # a process that joins belongs to the owner
                stack.enter_context(_owned(lock, path, busy))
        if remove:
            stack.callback(lock.unlink, missing_ok=True)
        yield


@contextmanager
def lock_folder(folder: Path, busy: str, *, join: bool = False) -> Iterator[None]:
    """Lock a folder, created if missing, until the block ends or all processes that share the lock have exited.

    join: share the lock of the same run's process that locked the folder. Raises Failure(busy) if another run locked it.
    """
    exclusive = () if join else (fcntl.LOCK_EX,)  # excludes every other run before this one shares the lock
    with _locked(folder / "lock", folder, busy, *exclusive, fcntl.LOCK_SH):
        yield


@contextmanager
def lock_output(path: Path, busy: str = BUSY, *, wait_s: float = 0.0) -> Iterator[None]:
    """Lock a file or folder to write through PATH.lock, which is removed afterwards.

    Raises Failure(busy) if it stays locked for wait_s seconds.
    """
    if path.is_symlink() and not path.exists():  # the rename at the end would fail, or replace the link
        raise Failure(f"{path}: a link to {path.readlink()}, which does not exist; create that, or remove the link")
    until = time.monotonic() + wait_s
    with ExitStack() as stack:
        while True:
            try:
                lock = path.with_name(path.name + ".lock")
                stack.enter_context(_locked(lock, path, busy, fcntl.LOCK_EX, remove=True))
                break
            except Failure as failure:
                is_busy = isinstance(failure.__cause__, BlockingIOError | None)
                if not is_busy or time.monotonic() >= until:
                    raise
                time.sleep(0.05)
        yield
