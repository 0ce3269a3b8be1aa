"""SIGTERM and SIGINT as a wish: the work goes on to a good place, writes what it has, and leaves with `STOPPED`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same work can go on later

_asked = False
_word: Path | None = None  # a launcher leaves word there for its processes, which look for it


class Stopped(SystemExit):
    """A run that was asked to stop has written a checkpoint; raised after its line was printed."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as wishes while the block runs. A second Ctrl-C is what it was before: an interruption."""
    global _asked
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _: Any) -> None:
        global _asked
        _asked = True
        if _word is not None:
            _word.touch()
        if number == signal.SIGINT:
            os.write(2, b"\nstopping at the end of this step; Ctrl-C again to end at once\n")
            signal.signal(number, before[number])

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield
    finally:
        _asked = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def passing_on(word: Path) -> Iterator[None]:
    """In a launcher: a wish goes on to the processes that look at this file."""
    global _word
    _word = word
    try:
        if _asked:
            word.touch()
        yield
    finally:
        _word = None


def heed(word: Path) -> None:
    """In a launched process: where the launcher leaves word."""
    global _word
    _word = word


def asked() -> bool:
    """Whether this process, or its launcher, was asked to stop. Cheap: at most a look at one file."""
    return _asked or (_word is not None and _word.exists())
