"""Steps in bridge and in halo mode, taking turns in the same processes.

    python tools/bench/halo.py STORE CONFIG    the first training snapshot of a store
    python tools/bench/halo.py NODES PARTS     a block of particles, as `distegnn bench comm` makes it

Prints, of the slowest process, medians of seconds by the clock and of the processor, and of seconds in collectives.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench_pipeline
import torch

from dist_egnn import config as configs
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.train import trainer

MODES = ("bridge", "exchange")
REPEATS = 5


def steps(group: comm.Comm, path: str, store: str) -> dict[str, list[float]]:
    """Mode → median seconds of a step: wall, processor, in collectives."""
    works, found = {}, {}
    for mode in MODES:
        config = configs.load(path, [f"data.path={store}", f"partition.halo={mode}"])
        samples = open_dataset(config, group.rank, group.size)
        model = trainer.build_model(config, samples.widths, group)
        works[mode] = config, model, samples[samples.splits["train"][0]]
    taken: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for turn in range(REPEATS + 1):
        for mode in MODES[:: -1 if turn % 2 else 1]:
            config, model, graph = works[mode]
            group.max(0.0)  # all begin together
            clocks = [clock() for clock in (time.perf_counter, time.process_time, comm.collective_seconds)]
            loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
            loss.backward()
            group.sum_gradients(model.parameters())
            ends = (time.perf_counter(), time.process_time(), comm.collective_seconds())
            taken[mode].append([end - begun for end, begun in zip(ends, clocks, strict=True)])
    for mode, each in taken.items():
        found[mode] = [statistics.median(column) for column in zip(*each[1:], strict=True)]
    return found


if __name__ == "__main__":
    first, second = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        if first.isdigit():
            made = bench_pipeline._config(Path(folder), int(first), 14.6, int(second), 1, {}, "bridge")
            first, second = made.data.path, str(Path(folder) / "config.yaml")
            Path(second).write_text(configs.to_yaml(made))
        ranks = spawn.run_ranks(steps, Store(first).parts, second, first)
    print("mode        step [s]  processor [s]  collectives [s]")
    for name in MODES:
        wall, cpu, talk = (max(column) for column in zip(*(rank[name] for rank in ranks), strict=True))
        print(f"{name:10} {wall:9.3f} {cpu:14.3f} {talk:16.3f}")
