"""Limits of control groups, and memory that the process keeps."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_egnn.utils import memory, resources


def test_limits_of_a_control_group(tmp_path: Path) -> None:
    """Version 2 and version 1, and none."""
    none, two, one = (tmp_path / name for name in ("none", "two", "one"))
    for folder in (none, two, one / "cpu", one / "memory"):
        folder.mkdir(parents=True)
    assert (resources.cpu_quota(none), memory.cgroup_limit(none)) == (math.inf, math.inf)
    (two / "cpu.max").write_text("150000 100000\n")
    (two / "memory.max").write_text("1000000000\n")
    (two / "memory.stat").write_text("anon 400000000\nfile 500000000\n")
    assert (resources.cpu_quota(two), memory.cgroup_limit(two)) == (1.5, 1e9)
    assert resources.available_cores(two) <= 1.5
    assert memory.available_memory("cpu", two) <= 6e8
    (two / "cpu.max").write_text("max 100000\n")
    (two / "memory.max").write_text("max\n")
    assert (resources.cpu_quota(two), memory.cgroup_limit(two)) == (math.inf, math.inf)
    (one / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (one / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (one / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert (resources.cpu_quota(one), memory.cgroup_limit(one)) == (0.5, math.inf)
    (one / "memory" / "memory.limit_in_bytes").write_text("2000000000\n")
    assert memory.cgroup_limit(one) == 2e9


@pytest.mark.parametrize(
    ("setting", "kept"), [("", True), ("GLIBC_TUNABLES=x.trim_threshold", False), ("MALLOC_TRIM_THRESHOLD_=0", False)]
)
def test_freed_memory_is_kept(setting, kept):
    """The kernel maps no new pages for freed memory after the first round, unless the user's own settings say otherwise."""
    code = (
        "import ctypes, resource; from dist_egnn.utils.memory import keep_freed_memory; keep_freed_memory(); faults = []\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"  # PR_SET_THP_DISABLE: pages of one size
        "for _ in range(12):\n"
        "    held = [b'x' * 20_000_000 for _ in range(3)]; del held\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(faults[-1] - faults[1])"
    )
    name, _, value = setting.partition("=")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | ({name: value} if name else {})
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (int(ran.stdout) < 1000) is kept
