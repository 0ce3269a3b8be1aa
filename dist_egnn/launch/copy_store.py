"""Copy to each host its own part of a store, for hosts that share no file system."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Failure
from ..utils.progress import progress_bar
from .hostfile import Host

if TYPE_CHECKING:
    from ..data.store import Store

RSYNC = ("rsync", "--archive", "--relative", "--partial-dir=.dist_egnn-partial", "--mkpath", "-e")


def files_of_machine(store: Store, machine: int) -> list[str]:
    """The files of a store that a machine needs; the manifest comes last, since it marks a complete store."""
    from ..data.store import GRAPH

    (shard,) = store.snapshots["shard"].unique().tolist()
    parts = [f"{shard}/part{machine}/{name}.dgl" for name in ("graph", "node_feat", "edge_feat")]
    return ["snapshots.csv", "parts.csv", f"{shard}/{GRAPH}.json", *parts, "manifest.yaml"]


def copy_store(path: Path, hosts: list[Host]) -> None:
    """Copy the files that a host lacks, by rsync; the server there checks their hashes.

    Raises Failure without rsync, for a host that it does not reach, and for a store that is damaged here.
    """
    from ..data.store import open_store  # imports torch and DGL, which the launcher does not need otherwise

    if shutil.which("rsync") is None:
        raise Failure("--dispatch: rsync is not installed here; install it here and on the hosts, or copy the store")
    store = open_store(path)
    if store.machines != len(hosts) or store.snapshots["shard"].nunique() != 1:
        raise Failure(
            f"{path}: not a store for {len(hosts)} machines; partition with --parts {len(hosts)} --shard-nodes 0"
        )
    with progress_bar("dispatching", len(hosts)) as tick:
        for machine, host in enumerate(hosts):
            *names, manifest = files_of_machine(store, machine)
            for name in names:
                store.disk.verify(name)
            _copy_files(path, host, names)
            _copy_files(path, host, [manifest])
            tick(host.name)


def _copy_files(path: Path, host: Host, names: list[str]) -> None:
    if host.copy is None:
        raise Failure(f"--dispatch: host {host.name} is not reached by ssh; use a file system that the hosts share")
    command = [*RSYNC, host.copy, *(f"./{name}" for name in names), f"{host.name}:{path.absolute()}/"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"host {host.name}: rsync failed, exit code {done.returncode} ({reason}); repeat the command")
