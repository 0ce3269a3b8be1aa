"""Locks on files and folders, with and without the help of the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from dist_egnn.errors import Failure
from dist_egnn.utils.filesystem import lock_folder, lock_output


def _no_locks(*_: object) -> NoReturn:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("supported", [True, False])
def test_one_writer_at_a_time(tmp_path, monkeypatch, supported):
    if not supported:
        monkeypatch.setattr(fcntl, "flock", _no_locks)
    out, run = tmp_path / "out.h5", tmp_path / "run"
    for _ in range(2):
        with lock_output(out), lock_folder(run, "busy"):
            with pytest.raises(Failure, match=r"out\.h5: another process is writing it"), lock_output(out):
                pass
            with pytest.raises(Failure, match="run: busy"), lock_folder(run, "busy"):
                pass
            with lock_folder(run, "busy", join=True):  # a rank of the same run
                pass
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "lock"]


def test_a_dead_owner_holds_nothing_on_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    with subprocess.Popen("true") as ended:
        pass
    owner = tmp_path / "out.lock.owner"
    owner.write_text(f"{platform.node()} {ended.pid}")
    with lock_output(tmp_path / "out"):
        assert owner.read_text() == f"{platform.node()} {os.getpid()}"
    owner.write_text(f"another-host {ended.pid}")  # cannot be asked
    with pytest.raises(Failure, match=rf"out: .*rm {owner}"), lock_output(tmp_path / "out"):
        pass


def test_a_link_to_nowhere_is_no_output(tmp_path):
    """The rename at the end would fail after all work; a link to something is written as before."""
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(Failure, match=r"link: a link to nowhere, which does not exist"), lock_output(tmp_path / "link"):
        pass
    (tmp_path / "nowhere").touch()
    with lock_output(tmp_path / "link"):
        assert (tmp_path / "link.lock").exists()


def test_a_lock_file_that_was_removed_is_not_a_lock(tmp_path, monkeypatch):
    """The former holder removes it between this process's opening and locking it."""
    lock, plain, count = tmp_path / "out.lock", fcntl.flock, 0

    def flock(*arguments: object) -> None:
        nonlocal count
        plain(*arguments)
        count += 1
        if count == 1:
            lock.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_output(tmp_path / "out"), Path(lock).open(encoding="utf-8") as again, pytest.raises(BlockingIOError):
        plain(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert count == 2
