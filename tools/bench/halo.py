"""Time training steps with partition.halo=bridge and with exchange, alternating in the same processes.

    python tools/bench/halo.py STORE CONFIG    the first training snapshot of a store
    python tools/bench/halo.py NODES PARTS     a block of particles, as in `python tools/bench comm`

Prints medians of the slowest process: wall time, processor time and time in collectives, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import bench_data
import torch

from dist_egnn import config as configs
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.train import trainer

MODES = ("bridge", "exchange")
REPEATS = 5


def step_times(group: comm.Comm, path: str, store: str) -> dict[str, list[float]]:
    """Mode → median seconds of a step: wall, processor, in collectives."""
    cases = {}
    for mode in MODES:
        config = configs.load(path, [f"data.path={store}", f"partition.halo={mode}"])
        dataset = open_dataset(config, group.rank, group.size)
        model = trainer.build_model(config, dataset.widths, group)
        cases[mode] = config, model, dataset[dataset.splits["train"][0]]
    clocks = time.perf_counter, time.process_time, comm.collective_seconds
    times: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for turn in range(REPEATS + 1):
        for mode in MODES[:: -1 if turn % 2 else 1]:
            config, model, graph = cases[mode]
            group.max(0.0)  # a barrier
            started = [clock() for clock in clocks]
            loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
            loss.backward()
            group.sum_gradients(model.parameters())
            times[mode].append([clock() - start for clock, start in zip(clocks, started, strict=True)])
    return {mode: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for mode, rows in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="STORE|NODES")
    parser.add_argument("second", metavar="CONFIG|PARTS")
    options = parser.parse_args()
    store, config = options.first, options.second
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        if store.isdigit():
            made = bench_data.config_with_store(Path(folder), int(store), 14.6, int(config), 1, {}, "bridge")
            store, config = made.data.path, str(Path(folder) / "config.yaml")
            Path(config).write_text(configs.to_yaml(made), encoding="utf-8")
        ranks = spawn.run_ranks(step_times, Store(store).parts, config, store)
    print("mode        step [s]  processor [s]  collectives [s]")
    for mode in MODES:
        wall, cpu, collectives = (max(column) for column in zip(*(rank[mode] for rank in ranks), strict=True))
        print(f"{mode:10} {wall:9.3f} {cpu:14.3f} {collectives:16.3f}")


if __name__ == "__main__":
    main()
