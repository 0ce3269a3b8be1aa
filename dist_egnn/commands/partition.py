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


def run_comparison(path: Path, file: Trajectories, inputs: Inputs) -> None:
    """Cut the first snapshot with every method and print one row per method."""
    print_table(
        f"first snapshot of {path}, {inputs.processes} parts",
        ["method", "edges cut", "largest/mean", "halo/nodes", "seconds"],
        [
            [name, f"{quality.edge_cut:.1%}", f"{quality.balance:.3f}", f"{quality.halo_share:.1%}", f"{seconds:.2f}"]
            for name, quality, seconds in store_writer.compare_methods(file, inputs)
        ],
    )


def write_store(file: Trajectories, out: Path, inputs: Inputs) -> None:
    """Write a store with a progress display and print what it holds. A complete store is left as it is."""
    started = time.perf_counter()
    with progress_bar("partitioning", len(store_writer.list_snapshots(file, inputs))) as tick:
        fresh = store_writer.write_store(file, out, inputs, lambda done, _all: tick(completed=done))
    store = open_store(out)
    if not fresh:
        print(f"{out}: complete already, nothing to do")
    summary = store.summary()
    print_table(
        f"{out}: {len(store.snapshots)} snapshots in {store.parts} parts, {time.perf_counter() - started:.1f} s",
        ["method", "edges cut", "largest/mean", "halo/nodes"],
        [[store.inputs["method"], f"{summary['edge_cut']:.1%}", f"{summary['balance']:.3f}", f"{summary['halo']:.1%}"]],
    )


def store_inputs(config: Config) -> tuple[Trajectories, Inputs]:
    """The trajectories file of a config, and the inputs of its store. Raises Failure if it cannot be partitioned."""
    file = Trajectories(config.data.path)
    inputs = store_writer.build_inputs(
        file,
        parts=config.partition.parts,
        weights=config.partition.weights,
        method=config.partition.method,
        method_seed=config.partition.seed,
        settings=config.data,
    )
    store_writer.check_inputs(file, inputs)
    return file, inputs


def run_partition(config: Config, out: Path, checked: tuple[Trajectories, Inputs] | None = None) -> None:
    """Write the store of a config's trajectories file, or complete it, and set data.path to it.

    checked: what `store_inputs` returned, if it was called already.
    """
    file, inputs = checked or store_inputs(config)
    write_store(file, out, inputs)
    config.data.path = str(out.absolute())
