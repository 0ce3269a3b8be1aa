"""Waiting for processes. Limits are guards against a hang, far above what a loaded machine needs."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

GUARD_S = 600.0


def wait_until(condition: Callable[[], object], what: str, process: Any = None) -> None:
    """Wait until a condition holds, while ``process`` runs, if one is given."""
    end = time.monotonic() + GUARD_S
    while not condition():
        if process is not None and process.poll() is not None:
            assert condition(), f"the process ended before: {what}"
        assert time.monotonic() < end, f"not within {GUARD_S:g} s: {what}"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Whether a process has ended; its parent may not have waited for it yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def kill(process: subprocess.Popen) -> int:
    """End a process by SIGKILL; its exit code."""
    process.kill()
    return process.wait(GUARD_S)


def free_ports(count: int) -> list[int]:
    """Free ports of this machine below those that the kernel gives to connections of other tests."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise AssertionError("no free ports")
