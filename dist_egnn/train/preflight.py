"""Memory checks before a run starts: a process's estimated peak against free memory. Imports torch lazily.

The estimate (`memory.step_bytes`) was fitted to measurements in docs/scaling.md; `distegnn plan` measures instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils import memory

if TYPE_CHECKING:
    import numpy as np

    from ..config import Config
    from ..data.trajectories import Trajectories


def training_bytes(config: Config, nodes: float, edges: float, halo: float = 0.0, device: str = "cpu") -> float:
    """Peak memory in bytes of a training process on a part; halo: nodes whose rows it receives in halo mode."""
    model, batch = config.model, config.train.batch_size
    layers, block = 0 if config.train.kept else model.layers, float(model.tile)
    if device != "cpu":
        from ..ops import tiling

        block *= tiling.ACCELERATOR_FACTOR
    received = 4 * layers * (model.hidden + 3) * halo if config.partition.halo == "exchange" else 0.0
    return memory.step_bytes(batch * nodes, batch * edges, model.hidden, layers, block) + batch * received


def check_training(config: Config, parts: int) -> None:
    """Raise Failure if a training process on one of so many parts needs more memory than is free."""
    from ..data import checks, dataset, store, store_inputs
    from ..data.trajectories import Trajectories
    from .trainer import resolve_device

    device, path = str(resolve_device(config)), config.data.path
    if dataset.is_store(path):
        opened = store.open_store(path)
        store_inputs.check_settings(opened.inputs, str(opened.path), config.data)
        table = opened.parts_table
        if config.partition.halo != "exchange":
            table = table.assign(edges=table["edges"] - table["cut_edges"])
        largest = table[table["snapshot"].isin(opened.split("train"))].groupby("part")[["nodes", "edges"]].max()
        sizes = largest.assign(halo=table["halo"].max()).to_numpy(float).tolist()
    else:
        if parts == 1:  # else the partition checks it
            checks.warn_of_content(Trajectories(path))
        sizes = _estimated_sizes(config, parts)
    needed = max((training_bytes(config, n, e, halo, device) for n, e, halo in sizes), default=0.0)
    remedy = "raise partition.parts, or lower model.hidden, model.layers or train.batch_size, or set train.kept"
    memory.require_memory(needed, device, f"{path}: a step of one of {parts} processes", remedy)


def _estimated_sizes(config: Config, parts: int) -> list[tuple[float, float, float]]:
    """Nodes, edges and halo of the largest part of the largest training snapshot of a trajectories file."""
    from ..data.samples import select_snapshots
    from ..data.trajectories import Trajectories
    from ..utils import part_weights

    d, file = config.data, Trajectories(config.data.path)
    chosen = d.frames, d.first_frame, d.last_frame, d.frame_seed
    listed = select_snapshots(file, d.horizon, *chosen, d.history + d.pushforward, d.velocity)
    train = [snapshot for snapshot in listed if snapshot.split == "train"]
    if not train:
        return []
    largest = max(train, key=lambda snapshot: file[snapshot.trajectory].nodes)
    x = file.position(largest.trajectory, largest.frame)
    nodes = part_weights.fractions(config.partition.weights, parts).max() * len(x)
    return [(nodes, nodes * _degree(config, file, largest.trajectory, x), 0.0)]


def _degree(config: Config, file: Trajectories, k: int, x: np.ndarray) -> float:
    """In-edges of a node of a trajectory at x (N, 3)."""
    from ..data.edges import EdgeRule
    from ..data.samples import given_edges
    from ..partition import neighbors

    rule = EdgeRule.of(config.data)
    side = file.sides(k, rule.longest) if config.data.periodic else None
    return neighbors.mean_degree(x, rule, side, given_edges(file, k, rule)) * (1 - rule.edge_drop)


def check_rollout(config: Config, file: Trajectories, trajectory: int, start: int, processes: int, method: str) -> None:
    """Raise Failure if a step of a rollout needs more memory than is free: a share of the graph without a backward
    pass, or all edges where rank 0 must have them to partition."""
    from ..partition import assign, snapshot
    from .trainer import resolve_device

    d, m, x = config.data, config.model, file.position(trajectory, start)
    edges = len(x) * _degree(config, file, trajectory, x)
    needed = memory.step_bytes(len(x) / processes, edges / processes, m.hidden, 0, m.tile)
    if processes > 1 and (assign.METHODS[method].needs_edges or d.edge_drop or config.partition.halo == "exchange"):
        needed = max(needed, snapshot.memory_needed(method, len(x), edges))
    purpose = f"{file.path}: a step of trajectory {trajectory} on one of {processes} processes"
    remedy = "raise --parts, or use a machine with more memory"
    memory.require_memory(needed, str(resolve_device(config)), purpose, remedy)
