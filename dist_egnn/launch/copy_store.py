"""Copy to each host its own part of a store, for hosts that share no file system."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ..errors import Failure
from ..utils.progress import progress_bar
from .hostfile import Host

RSYNC = ("rsync", "--archive", "--relative", "--partial-dir=.dist_egnn-partial", "--mkpath", "-e")


def copy_store(path: Path, hosts: list[Host]) -> None:
    """Copy, by rsync, the files that a host lacks; the server there checks their hashes. Raises Failure."""
    from ..data.store import GRAPH, open_store  # imports torch and DGL, which the launcher does not need otherwise

    if shutil.which("rsync") is None:
        raise Failure("--dispatch: rsync is not installed here; install it here and on the hosts, or copy the store")
    store, count = open_store(path), len(hosts)
    if store.machines != count or store.snapshots["shard"].nunique() != 1:
        raise Failure(f"{path}: not a store for {count} machines; partition with --parts {count} --shard-nodes 0")
    shard = store.snapshots["shard"].iloc[0]
    with progress_bar("dispatching", count) as tick:
        for machine, host in enumerate(hosts):
            parts = [f"{shard}/part{machine}/{name}.dgl" for name in ("graph", "node_feat", "edge_feat")]
            names = ["snapshots.csv", "parts.csv", f"{shard}/{GRAPH}.json", *parts]
            for name in names:
                store.disk.verify(name)
            _copy_files(path, host, names)
            _copy_files(path, host, ["manifest.yaml"])  # last: it marks a complete store
            tick(host.name)


def _copy_files(path: Path, host: Host, names: list[str]) -> None:
    if host.copy is None:
        raise Failure(f"--dispatch: host {host.name} is not reached by ssh; use a file system that the hosts share")
    command = [*RSYNC, host.copy, *(f"./{name}" for name in names), f"{host.name}:{path.absolute()}/"]
    done = subprocess.run(
        command, cwd=path, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"host {host.name}: rsync failed, exit code {done.returncode} ({reason}); repeat the command")
