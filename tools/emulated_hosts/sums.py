"""Time a sum over processes on hosts with a delay between them: gloo's all-reduce and the direct exchange of comm.py.

    python tools/emulated_hosts/sums.py --delay 20 --hosts 4

Needs root, because the hosts are emulated (docs/hosts.md). Prints medians of 7 repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import string
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from hosts import INTERFACE, Hosts

from dist_egnn.distributed import comm

NUMBERS = (300, 3_000, 300_000)
PORT = 29_555


def _median_ms(work: Callable[[], object], repeats: int = 7) -> float:
    work()
    times = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def rank(number: int, size: int, address: str, interface: str) -> None:
    """One process of the group; rank 0 prints."""
    torch.set_num_threads(1)
    group = comm.join_hosts(number, size, address, PORT, interface, 60.0)
    for n in NUMBERS:
        t = torch.randn(n)
        ring = _median_ms(lambda t=t: dist.all_reduce(t.clone()))  # type: ignore[misc]
        direct = _median_ms(lambda t=t: group.sum(t))  # type: ignore[misc]
        if number == 0:
            print(f"  {n:>7,} numbers: all-reduce {ring:6.1f} ms, direct {direct:6.1f} ms", flush=True)
    comm.leave_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.0, help="ms, one way")
    parser.add_argument("--hosts", type=int, default=2)
    options = parser.parse_args()
    names = list(string.ascii_lowercase[: options.hosts])
    with Hosts(names) as hosts:
        hosts.set(delay_ms=options.delay)
        print(f"{options.hosts} hosts, {options.delay:g} ms each way")
        argv = [sys.executable, __file__, "rank"]
        for process in [
            hosts.run(name, [*argv, str(k), str(len(names)), hosts.address(names[0]), INTERFACE])
            for k, name in enumerate(names)
        ]:
            process.wait(300)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    else:
        main()
