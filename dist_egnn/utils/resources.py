"""What this machine, or the container we are in, lets a process have: cores and memory. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

from ..errors import Failure

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
GROUPS = Path("/sys/fs/cgroup")


def _groups(controller: str, root: Path) -> list[Path]:
    """Folders that may hold our control group's limits, of both versions; within a container its group is the root."""
    own = ""
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(",") or not names:
                own = path.strip("/") or own
    except (OSError, ValueError):
        pass
    bases = [root, root / controller, root / f"{controller},cpuacct"]
    return [*bases, *(base / own for base in bases if own)]


def _limit(controller: str, files: tuple[str, ...], root: Path) -> list[list[str]]:
    """The words of every file of these names that our control group has."""
    found = []
    for folder in _groups(controller, root):
        for name in files:
            try:
                found.append((folder / name).read_text().split())
            except OSError:
                continue
    return found


def core_quota(root: Path = GROUPS) -> float:
    """Cores that the control group grants, which may be a fraction; infinity without a limit."""
    quota = math.inf
    for words in _limit("cpu", ("cpu.max",), root):
        if words[0] != "max":
            quota = min(quota, int(words[0]) / int(words[1]))
    whole = _limit("cpu", ("cpu.cfs_quota_us",), root)
    for given, period in zip(whole, _limit("cpu", ("cpu.cfs_period_us",), root), strict=False):
        if int(given[0]) > 0:
            quota = min(quota, int(given[0]) / int(period[0]))
    return quota


def cores(root: Path = GROUPS) -> float:
    """Cores that our processes can use together: those allowed to us, or the control group's share of them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(allowed), core_quota(root))


def memory_limit(root: Path = GROUPS) -> float:
    """Bytes that the control group may hold; infinity without a limit."""
    words = _limit("memory", ("memory.max", "memory.limit_in_bytes"), root)
    given = [float(word[0]) for word in words if word and word[0] != "max"]
    return min([limit for limit in given if limit < 2**60], default=math.inf)  # version 1 says "none" by a huge number


def memory_free(root: Path = GROUPS) -> float:
    """Bytes that new processes can still take; infinity where the machine does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    limit = memory_limit(root)
    if limit == math.inf:
        return free
    # what the kernel would give up for us, its cache of files, is no use of the limit
    held = [dict(zip(w[::2], map(float, w[1::2]), strict=False)) for w in _limit("memory", ("memory.stat",), root)]
    used = [stat.get("anon", stat.get("total_rss", 0.0)) for stat in held]
    return min(free, max(limit - min(used, default=0.0), 0.0))


def memory_there(device: str) -> float:
    """Bytes that this machine, or the device, can still give; infinity where it does not say."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    return memory_free()


def enough_memory(needed: float, device: str, what: str, remedy: str) -> None:
    """Raise Failure where ``what`` needs more bytes than there are."""
    if needed > (there := memory_there(device)):
        raise Failure(f"{what} takes about {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are free; {remedy}")


def mallopt(option: int, value: int) -> None:
    """Set one of glibc's <malloc.h> options; elsewhere nothing."""
    getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)(option, value)


def keep_memory() -> None:
    """Let malloc keep the memory of tensors that a step frees and the next one takes again, else the kernel zeroes it anew.

    glibc moves both limits up by itself, but not to the end, which these are. What the user has set stands.
    """
    said = os.environ.get("GLIBC_TUNABLES", "")
    if not any("threshold" in word.lower() for word in (said, *(k for k in os.environ if k.startswith("MALLOC_")))):
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def step_bytes(nodes: float, edges: float, hidden: int, layers: int, block: float) -> float:
    """About how many bytes the process of a training step takes, torch and DGL included, before anything is measured.

    layers: those whose inputs and means lie in memory (0: in files, one layer's at a time); block: edges of a block of the tiles;
    from ``edges`` on the graph is in one piece, and autograd keeps everything.
    """
    row = 4 * (hidden + 3)
    base = 0.4e9 + nodes * ((2 * max(layers, 1) + 2) * row + 250) + edges * 26  # docs/scaling.md
    return base + (11 * layers * edges if block >= edges else 12 * block) * row  # some eleven E×H arrays a layer


def served_bytes(nodes: int, edges: int, halo: int, floats: int, trainers: int) -> int:
    """What a graph server takes of its /dev/shm: its graph in both formats, numbers and flags of nodes and edges, and the fields of
    its own nodes, ``floats`` of them in single precision. A little more than that where trainers of a machine share halo nodes.
    """
    fields = 4 * floats + 8 * (3 if trainers > 1 else 2)
    return 41 * edges + 17 * (nodes + halo) + fields * nodes + (64 << 10)
