"""CPU cores that this machine, or the container around the process, grants. Imports no heavy library."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def read_cgroup(controller: str, *names: str, root: Path = CGROUP_ROOT) -> list[list[str]]:
    """The words of each of the files in the folders of our control group (v1 and v2; ``root`` inside a container)."""
    own = ""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") or not controllers:
                own = path.strip("/") or own
    bases = [root, root / controller, root / f"{controller},cpuacct"]
    contents = []
    for file in (folder / name for folder in [*bases, *(base / own for base in bases if own)] for name in names):
        with suppress(OSError):
            contents.append(file.read_text(encoding="utf-8").split())
    return contents


def cpu_quota(root: Path = CGROUP_ROOT) -> float:
    """Cores that the control group grants, possibly a fraction; infinity without a limit."""
    v2 = [words for words in read_cgroup("cpu", "cpu.max", root=root) if words[0] != "max"]
    quota, period = (read_cgroup("cpu", f"cpu.cfs_{name}_us", root=root) for name in ("quota", "period"))
    v1 = [(q[0], p[0]) for q, p in zip(quota, period, strict=False) if int(q[0]) > 0]
    return min((int(q) / int(p) for q, p in (*v2, *v1)), default=math.inf)


def available_cores(root: Path = CGROUP_ROOT) -> float:
    """Cores that our processes can use together: the CPU affinity, limited by the control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(allowed), cpu_quota(root))
