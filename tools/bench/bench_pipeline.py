"""The time from a stored snapshot to the end of its training step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bench_data
import numpy as np
import torch
from dgl import DGLGraph

from dist_egnn.config import Config
from dist_egnn.data import graphs, halo
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.train import trainer
from dist_egnn.train.metrics import peak_memory_gb
from dist_egnn.utils import devices


def _measure_rank(group: comm.Comm, config: Config, repeats: int) -> dict[str, Any]:
    """Mean seconds of a step on a fixed graph, of a step on a new snapshot, and of the stages that prepare a step.

    Also peak_gb, of the process or its CUDA device, and the ``backend`` of sums.
    """
    dataset = open_dataset(config, group.rank, group.size)
    numbers = dataset.splits["train"]
    device = trainer.join_device(group, config)
    model = trainer.build_model(config, dataset.widths, group).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step_seconds(batches: Iterable[DGLGraph]) -> float:
        """Mean seconds from the end of a step to the end of the next; the first step is not counted."""
        ends = []
        for graph in batches:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
            loss.backward()
            group.sum_gradients(model.parameters(), torch.zeros(3))
            optimizer.step()
            devices.synchronize(device)
            ends.append(time.perf_counter())
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    first = dataset[numbers[0]]
    fixed = [first] * (repeats + 1)
    step_seconds(fixed[:2])
    before = step_seconds(fixed)
    dataset = open_dataset(config, group.rank, group.size)  # an empty cache
    fresh_s = step_seconds(trainer.prepared_batches(model, dataset, [[n] for n in numbers[: repeats + 1]]))
    # steps on the fixed graph are timed before and after, so that a change of the machine's speed does not favour one
    steps = {"fixed_s": (before + step_seconds(fixed)) / 2, "fresh_s": fresh_s}
    store = Store(config.data.path)
    stages: dict[str, list[float]] = {"read_s": [], "graph_s": [], "tiles_s": [], "edges_s": []}
    for number in numbers[1 : repeats + 1]:
        times = [time.perf_counter()]
        store.source.part(store.snapshots.loc[number]["shard"], group.rank)
        times.append(time.perf_counter())
        graph = store.read(number, group.rank, exchange=halo.get(first) is not None)
        times.append(time.perf_counter())
        getattr(model, "prepare", lambda graph: graph)(graph)
        times.append(time.perf_counter())
        graphs.radius_edges(graph.ndata["x"].numpy(), store.inputs["radius"])
        times.append(time.perf_counter())
        for name, seconds in zip(stages, np.diff(times).tolist(), strict=True):
            stages[name].append(seconds)
    means = {name: statistics.mean(seconds) for name, seconds in stages.items()}
    return {**steps, **means, "peak_gb": peak_memory_gb(device), "backend": group.backend}


def measure_pipeline(
    nodes: int,
    degree: float,
    parts: int,
    repeats: int,
    model: dict[str, Any],
    log: Callable[[str], None],
    halo_mode: str = "bridge",
    device: str = "cpu",
) -> dict[str, Any]:
    """The seconds of `_measure_rank` of the slowest process, and ``ratio``, a new snapshot to a fixed graph."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        config = bench_data.config_with_store(Path(folder), nodes, degree, parts, repeats + 1, model, halo_mode)
        config.train.device = device
        log(f"store of {repeats + 1} snapshots written")
        ranks = spawn.run_ranks(_measure_rank, parts, config, repeats)
    result = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return {
        "nodes": nodes,
        "parts": parts,
        "repeats": repeats,
        **result,
        "ratio": result["fresh_s"] / result["fixed_s"],
    }
