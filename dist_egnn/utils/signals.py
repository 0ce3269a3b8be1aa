"""SIGTERM, SIGHUP and SIGINT as stop requests: a run writes a checkpoint at the next step and exits with EXIT_STOPPED."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing failed, the command can be resumed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_requested = False
_stop_file: Path | None = None  # a launcher creates it to stop the processes that it started


class Stopped(SystemExit):
    """A run stopped on request, after it wrote a checkpoint and printed its last line; exits with EXIT_STOPPED."""


@contextmanager
def catch_stop_signals() -> Iterator[None]:
    """Record SIGTERM, SIGHUP and SIGINT as stop requests inside the block. A second Ctrl-C interrupts at once."""
    global _requested
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def request_stop(number: int, _: Any) -> None:
        global _requested
        _requested = True
        if _stop_file is not None:
            _stop_file.touch()
        if number == signal.SIGINT:
            with suppress(OSError):  # nobody reads standard error
                os.write(2, b"\nstopping at the end of this step; press Ctrl-C again to stop at once\n")
            signal.signal(number, previous[number])

    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, request_stop)
    try:
        yield
    finally:
        _requested = False
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def forward_stop(stop_file: Path) -> Iterator[None]:
    """In a launcher: create ``stop_file`` on a stop request; the launched processes watch it."""
    watch_stop_file(stop_file)
    try:
        if _requested:
            stop_file.touch()
        yield
    finally:
        watch_stop_file(None)


def watch_stop_file(stop_file: Path | None) -> None:
    """In a launched process: the existence of ``stop_file`` is a stop request."""
    global _stop_file
    _stop_file = stop_file


def stop_requested() -> bool:
    """Whether this process or its launcher received a stop request. Cheap: it tests at most one file."""
    return _requested or (_stop_file is not None and _stop_file.exists())
