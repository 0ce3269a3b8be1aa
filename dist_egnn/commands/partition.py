"""`distegnn partition`: write the store of a trajectories file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from ..data.store import open_store
from ..data.trajectories import Trajectories
from ..partition import store_writer
from ..utils.console import print_table
from ..utils.progress import progress_bar

if TYPE_CHECKING:
    from ..partition.snapshot import Inputs

HEADER = ["method", "edges cut", "largest/mean", "halo/nodes"]


def run_comparison(path: Path, file: Trajectories, inputs: Inputs) -> None:
    """Partition the first snapshot by every method and print one row per method."""
    rows = [
        [method, f"{q.edge_cut:.1%}", f"{q.balance:.3f}", f"{q.halo_share:.1%}", f"{seconds:.2f}"]
        for method, q, seconds in store_writer.compare_methods(file, inputs)
    ]
    print_table(f"first snapshot of {path}, {inputs.processes} parts", [*HEADER, "seconds"], rows)


def write_store(file: Trajectories, inputs: Inputs, out: Path) -> None:
    """Write a store with a progress display and print what it holds. A complete store is left as it is."""
    started = time.perf_counter()
    with progress_bar("partitioning", len(store_writer.list_snapshots(file, inputs))) as tick:
        fresh = store_writer.write_store(file, out, inputs, lambda done, _all: tick(completed=done))
    if not fresh:
        print(f"{out}: complete already, nothing to do")
    store = open_store(out)
    q = store.summary()
    title = f"{out}: {len(store.snapshots)} snapshots in {store.parts} parts, {time.perf_counter() - started:.1f} s"
    row = [store.inputs["method"], f"{q['edge_cut']:.1%}", f"{q['balance']:.3f}", f"{q['halo']:.1%}"]
    print_table(title, HEADER, [row])


def store_inputs(config: Config, trainers: int = 1, shard_nodes: int | None = None) -> tuple[Trajectories, Inputs]:
    """The trajectories file of a config, and the inputs of its store."""
    file, p = Trajectories(config.data.path), config.partition
    size = store_writer.SHARD_NODES if shard_nodes is None else shard_nodes
    options = {"parts": p.parts, "weights": p.weights, "method": p.method, "method_seed": p.seed}
    return file, store_writer.build_inputs(file, trainers=trainers, shard_nodes=size, settings=config.data, **options)


def run_partition(config: Config, out: Path, opened: tuple[Trajectories, Inputs] | None = None) -> None:
    """Write or complete the store of a config's file, and set data.path to it. opened: a result of `store_inputs`."""
    write_store(*(opened or store_inputs(config)), out)
    config.data.path = str(out.absolute())
