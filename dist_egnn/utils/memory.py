"""Available memory, estimates of the memory that a training step and a graph server need, and malloc settings."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

from ..errors import Failure
from .resources import CGROUP_ROOT, read_cgroup

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def cgroup_limit(root: Path = CGROUP_ROOT) -> float:
    """Memory limit of the control group in bytes; infinity without a limit."""
    words = read_cgroup("memory", "memory.max", "memory.limit_in_bytes", root=root)
    limits = [float(word[0]) for word in words if word and word[0] != "max"]
    return min((limit for limit in limits if limit < 2**60), default=math.inf)  # v1 uses a huge number for "none"


def available_memory(device: str = "cpu", root: Path = CGROUP_ROOT) -> float:
    """Bytes that new processes can still allocate on the machine or the device; infinity if that is unknown."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    # the page cache does not count as used: the kernel releases it on demand
    words = read_cgroup("memory", "memory.stat", root=root)
    stats = [dict(zip(w[::2], map(float, w[1::2]), strict=False)) for w in words]
    used = min((stat.get("anon", stat.get("total_rss", 0.0)) for stat in stats), default=0.0)
    return min(free, max(cgroup_limit(root) - used, 0.0))


def require_memory(needed: float, device: str, purpose: str, remedy: str) -> None:
    """Raise Failure if ``purpose`` needs more bytes than are available."""
    if needed > (available := available_memory(device)):
        raise Failure(f"{purpose} takes about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free; {remedy}")


def mallopt(option: int, value: int) -> None:
    """Set one of the <malloc.h> options of glibc; does nothing with other C libraries."""
    getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)(option, value)


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees for the next one (else the kernel zeroes it anew), unless the user set it up."""
    malloc_variables = [name for name in os.environ if name.startswith("MALLOC_")]
    settings = " ".join([os.environ.get("GLIBC_TUNABLES", ""), *malloc_variables]).lower()
    if "threshold" not in settings:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # glibc raises both thresholds by itself, but only up to these values
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def step_bytes(nodes: float, edges: float, hidden: int, layers: int, block: float) -> float:
    """Estimated bytes of a training process, torch and DGL included (docs/scaling.md).

    layers: those whose inputs and means stay in memory (0: they are offloaded, means tile by tile). block: edges of a tile block;
    a graph with fewer edges is not tiled, and autograd keeps all messages.
    """
    row = 4 * (hidden + 3)
    base = 0.4e9 + nodes * ((2 * layers + 2 if layers else 3) * row + 250) + edges * 26
    return base + (11 * layers * edges if block >= edges else 12 * block) * row  # about eleven E×H arrays a layer


def graph_server_bytes(nodes: int, edges: int, halo: int, floats: int, trainers: int) -> int:
    """Upper bound of a graph server's use of /dev/shm, in bytes. floats: float32 numbers for each of its own nodes."""
    fields = 4 * floats + 8 * (3 if trainers > 1 else 2)
    # the graph in two formats, ids and flags; halo nodes that several trainers share count more than once
    return 41 * edges + 17 * (nodes + halo) + fields * nodes + (64 << 10)
