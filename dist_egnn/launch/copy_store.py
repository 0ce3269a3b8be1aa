"""Copy to each host its own part of a store, where the hosts share no file system."""

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


def files_of(store: Store, machine: int) -> list[str]:
    """The files of a store that a machine needs, the manifest last: without it the rest is no store."""
    from ..data.store import GRAPH

    (shard,) = store.snapshots["shard"].unique().tolist()
    names = ("graph", "node_feat", "edge_feat")
    parts = [f"{shard}/part{machine}/{name}.dgl" for name in names]
    return ["snapshots.csv", "parts.csv", f"{shard}/{GRAPH}.json", *parts, "manifest.yaml"]


def dispatch(path: Path, hosts: list[Host]) -> None:
    """Bring every host's files there by rsync, as far as they are not there yet; its server checks their hashes.

    Raises Failure where there is no rsync, a host cannot be copied to, or the store is not whole here.
    """
    from ..data.store import Store  # brings torch and DGL, which a launch does without

    if shutil.which("rsync") is None:
        raise Failure(
            "--dispatch: rsync is not installed here; install it, here and on the hosts, or copy the store yourself"
        )
    store = Store(path)
    if store.machines != len(hosts) or store.snapshots["shard"].nunique() != 1:
        raise Failure(
            f"{path}: not a store for {len(hosts)} machines; partition with --parts {len(hosts)} --shard-nodes 0"
        )
    with progress_bar("dispatching", len(hosts)) as tick:
        for machine, host in enumerate(hosts):
            *names, manifest = files_of(store, machine)
            for name in names:
                store.disk.verify(name)
            for some in (names, [manifest]):
                _copy(path, host, some)
            tick(host.name)


def _copy(path: Path, host: Host, names: list[str]) -> None:
    if host.copy is None:
        raise Failure(f"--dispatch: host {host.name} is not reached by ssh; use a file system that the hosts share")
    command = ["rsync", "--archive", "--relative", "--partial-dir=.dist_egnn-partial", "--mkpath", "-e", host.copy]
    done = subprocess.run(
        [*command, *(f"./{name}" for name in names), f"{host.name}:{path.absolute()}/"],
        cwd=path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(
            f"host {host.name}: rsync ended with {done.returncode} ({last}); the same command goes on where it was"
        )
