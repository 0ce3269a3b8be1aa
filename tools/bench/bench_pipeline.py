"""What surrounds a step, measured: partitioning, what processes send each other, and the way from a store into a step."""

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

from dist_egnn.config import Config, Data
from dist_egnn.config import load as load_config
from dist_egnn.data import graphs, halo
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.store import Store
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.distributed import comm, spawn
from dist_egnn.distributed.call_counter import PHASES, Call, counted_collectives
from dist_egnn.ops import message_passing, tiling
from dist_egnn.train import trainer

Say = Callable[[str], None]


def _write_store(file: Trajectories, out: Path, radius: float, parts: int) -> Data:
    """Partition a trajectories file by METIS; returns the data settings that read it."""
    from dist_egnn.partition import store_writer

    settings = Data(
        path=str(out),
        radius=radius,
        horizon=1,
        features=list(bench_data.FEATURES),
        node_attributes=list(bench_data.ATTRIBUTES),
    )
    inputs = store_writer.build_inputs(
        file, parts=parts, method="metis", method_seed=0, settings=settings, shard_nodes=store_writer.SHARD_NODES
    )
    store_writer.write_store(file, out, inputs, lambda done, _all: None)
    return settings


def _config(
    folder: Path, nodes: int, degree: float, parts: int, snapshots: int, model: dict[str, Any], mode: str
) -> Config:
    """A config whose data are a new store in ``folder``."""
    x = bench_data.block(nodes)
    bench_data.write_trajectories(folder / "block.h5", x, snapshots)
    config = load_config(None, [f"partition.halo={mode}", *(f"model.{key}={value}" for key, value in model.items())])
    config.data = _write_store(
        Trajectories(folder / "block.h5"), folder / "store", bench_data.radius_for(x, degree), parts
    )
    return config


# partition


def partition(nodes: int, degree: float, parts: int, say: Say) -> dict[str, Any]:
    """Every method on one block, the seconds of ``assign`` alone; then a store of that snapshot, METIS and edges included."""
    from dist_egnn.partition import assign

    x = bench_data.block(nodes)
    radius = bench_data.radius_for(x, degree)
    src, dst = graphs.radius_edges(x, radius)
    tiny = bench_data.block(20 * parts)
    few = graphs.radius_edges(tiny, 1.5 * bench_data.SPACING)
    found = {}
    for name in assign.METHODS:
        assign.assign(name, tiny, *few, parts)  # loads what the method needs
        started = time.perf_counter()
        part = assign.assign(name, x, src, dst, parts)
        seconds = time.perf_counter() - started
        quality = assign.quality(part, src, dst, parts)
        found[name] = {
            "seconds": seconds,
            "edge_cut": quality.edge_cut,
            "balance": quality.balance,
            "halo": quality.halo_share,
        }
        say(f"{nodes:,} nodes, {name}: {seconds:.2f} s")
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        path = Path(folder) / "block.h5"
        bench_data.write_trajectories(path, x, 1)
        file = Trajectories(path)
        started = time.perf_counter()
        _write_store(file, Path(folder) / "store", radius, parts)
        seconds = time.perf_counter() - started
    return {"nodes": nodes, "edges": len(src), "parts": parts, "store_s": seconds, "methods": found}


# comm


def count_calls(group: comm.Comm, config: Config, snapshot: int | None = None) -> dict[str, list[Call]]:
    """The collectives that this process calls in one training step, by phase.

    snapshot: its number, by default that of the first training snapshot."""
    samples = open_dataset(config, group.rank, group.size)
    model = trainer.build_model(config, samples.widths, group)
    graph = samples[samples.splits["train"][0] if snapshot is None else snapshot]
    if halos := halo.get(graph):
        halos.link(graph.ndata["x"], group)  # once per snapshot, not per step
    with counted_collectives() as counter:
        loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
        counter.enter("backward")
        loss.backward()
        counter.enter("gradients")
        group.sum_gradients(model.parameters(), torch.zeros(3))
    return {phase: [call for call in counter.calls if call.phase == phase] for phase in PHASES}


def communication(nodes: int, degree: float, parts: int, model: dict[str, Any], mode: str = "bridge") -> dict[str, Any]:
    """Calls, numbers a call and bytes of each phase of a training step on ``parts`` processes, beside 3 + 3C + HC."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        config = _config(Path(folder), nodes, degree, parts, 1, model, mode)
        ranks = spawn.run_ranks(count_calls, parts, config)
    sizes = [[(call.phase, call.name, call.payload) for calls in rank.values() for call in calls] for rank in ranks]
    hidden, count = config.model.hidden, config.model.virtual_nodes
    phases = {
        phase: {
            "calls": len(calls),
            "collectives": sorted({call.name for call in calls}),
            "floats": [call.payload // call.width for call in calls],
            "bytes": sum(call.payload for call in calls),
        }
        for phase, calls in ranks[0].items()
    }
    return {
        "parts": parts,
        "layers": config.model.layers,
        "formula": (parts - 1) * (3 + 3 * count + hidden * count),
        "alike": all(rank == sizes[0] for rank in sizes),
        "phases": phases,
    }


# pipeline


def _road(group: comm.Comm, config: Config, repeats: int) -> dict[str, float]:
    """Mean seconds of a step on a fixed graph, of one with a new snapshot each time, and of what leads to a step."""
    samples = open_dataset(config, group.rank, group.size)
    numbers = samples.splits["train"]
    model = trainer.build_model(config, samples.widths, group)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def steps(graphs_: Iterable[DGLGraph]) -> float:
        """Mean seconds from the end of a step to the end of the next, the first left out."""
        ends = []
        for graph in graphs_:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
            loss.backward()
            group.sum_gradients(model.parameters(), torch.zeros(3))
            optimizer.step()
            ends.append(time.perf_counter())
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    read = samples[numbers[0]]
    fixed = [read] * (repeats + 1)
    steps(fixed[:2])
    before = steps(fixed)
    samples = open_dataset(config, group.rank, group.size)  # an empty cache
    fresh = steps(trainer.prepared_batches(model, samples, [[n] for n in numbers[: repeats + 1]]))
    # on both sides of the fresh ones, so that a machine that slows down does not look like a slow road
    found = {"fixed_s": (before + steps(fixed)) / 2, "fresh_s": fresh}
    chosen = message_passing.resolve_engine(config.model.engine)
    store = Store(config.data.path)
    parts: dict[str, list[float]] = {"read_s": [], "graph_s": [], "tiles_s": [], "edges_s": []}
    for number in numbers[1 : repeats + 1]:
        times = [time.perf_counter()]
        store.source.part(store.snapshots.loc[number]["shard"], group.rank)
        times.append(time.perf_counter())
        graph = store.read(number, group.rank, exchange=halo.get(read) is not None)
        times.append(time.perf_counter())
        tiling.tiles_of(graph, chosen, config.model.tile)
        times.append(time.perf_counter())
        graphs.radius_edges(graph.ndata["x"].numpy(), store.inputs["radius"])  # what storing them saves
        times.append(time.perf_counter())
        for name, seconds in zip(parts, np.diff(times).tolist(), strict=True):
            parts[name].append(seconds)
    return {**found, **{name: statistics.mean(seconds) for name, seconds in parts.items()}}


def pipeline(
    nodes: int, degree: float, parts: int, repeats: int, model: dict[str, Any], say: Say, mode: str = "bridge"
) -> dict[str, Any]:
    """The road from a stored snapshot to the end of its step, of the slowest process."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        config = _config(Path(folder), nodes, degree, parts, repeats + 1, model, mode)
        say(f"store of {repeats + 1} snapshots written")
        ranks = spawn.run_ranks(_road, parts, config, repeats)
    found = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return {"nodes": nodes, "parts": parts, "repeats": repeats, **found, "ratio": found["fresh_s"] / found["fixed_s"]}
