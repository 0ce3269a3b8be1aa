"""Particles for the benchmarks: a block of a jittered cubic lattice, and the radius that gives a mean degree.

Legend: N nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from dist_egnn.config import Config
from dist_egnn.config import load as load_config
from dist_egnn.data.trajectories import Trajectories, Writer

SPACING = 0.05  # lattice constant
FEATURES, ATTRIBUTES = ("viscosity", "mass", "speed"), ("viscosity", "mass")  # F = 3, K = 2, as in Fluid113K
MAX_COUNTED, SAMPLE = 2**20, 30_000  # the degree of more nodes is estimated from a sample
DRIFT = 0.02  # displacement of a particle per frame, in lattice spacings


def block(nodes: int, seed: int = 0) -> np.ndarray:
    """Positions (N, 3) float32 in the order of the lattice: neighbours are close in memory, as in simulation output."""
    side = math.ceil(round(nodes ** (1 / 3), 6))
    cell = np.stack(np.unravel_index(np.arange(nodes), (side, side, -(-nodes // side**2))), 1)
    jitter = np.random.default_rng(seed).uniform(-0.25, 0.25, (nodes, 3))
    return (SPACING * (cell + jitter)).astype(np.float32)


def chain(nodes: int, seed: int = 0, step: float = 3.8, reach: float = 22.0) -> np.ndarray:
    """Positions (N, 3) float32 of a random chain in a ball, in Å: a substitute for the backbone of a folded protein."""
    draw = np.random.default_rng([seed, 3])
    x = np.zeros((nodes, 3))
    for k in range(1, nodes):
        while True:
            direction = draw.normal(size=3)
            x[k] = x[k - 1] + step * direction / np.linalg.norm(direction)
            if np.linalg.norm(x[k]) <= reach:
                break
    return x.astype(np.float32)


def radius_for(x: np.ndarray, degree: float) -> float:
    """The radius at which nodes of x (N, 3) have ``degree`` neighbours on average, 0 < degree ≤ N − 1.

    Exact to one edge; above MAX_COUNTED nodes estimated from a sample, to about 0.1%.
    """
    x = np.asarray(x, dtype=np.float64)
    if len(x) > MAX_COUNTED:
        sample = x[np.random.default_rng(0).integers(len(x), size=SAMPLE)]
        tree = KDTree(x, balanced_tree=False, compact_nodes=False)
        distance = tree.query(sample, min(round(3 * degree) + 30, len(x)))[0][
            :, 1:
        ].ravel()  # column 0: the node itself
        rank = round(SAMPLE * degree)
        return float(np.partition(distance, rank)[rank])
    edges = max(round(len(x) * degree / 2), 1)
    radius = SPACING * (degree * 3 / (4 * math.pi)) ** (1 / 3)  # exact for a block without a surface
    tree, all_pairs = KDTree(x), len(x) * (len(x) - 1) // 2
    while len(pairs := tree.query_pairs(radius, output_type="ndarray")) < min(edges + 1, all_pairs):
        radius *= 1.15
    if len(pairs) <= edges:
        return radius
    squared = np.partition(((x[pairs[:, 0]] - x[pairs[:, 1]]) ** 2).sum(1), (edges - 1, edges))
    return math.sqrt((squared[edges - 1] + squared[edges]) / 2)


def node_fields(x: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Node fields x, v, f (N, 3), a (N, 2), y (N, 3), and total and centroid as a store gives them, of positions x."""
    draw = np.random.default_rng([seed, 1])
    n = len(x)
    v = draw.normal(0, SPACING, (n, 3))
    a = np.stack([np.full(n, 0.01), draw.uniform(0.5, 2.0, n)], 1)
    fields = {
        "x": x,
        "v": v,
        "f": np.concatenate([a, np.linalg.norm(v, axis=1, keepdims=True)], 1),
        "a": a,
        "y": x + v + draw.normal(0, SPACING / 10, (n, 3)),
    }
    return {
        **{name: value.astype(np.float32) for name, value in fields.items()},
        "total": np.full(n, n),
        "centroid": np.tile(x.astype(np.float64).mean(0), (n, 1)),
    }


def _add_drifting(
    out: Writer, x: np.ndarray, split: str, snapshots: int, velocity: np.ndarray, mass: np.ndarray
) -> None:
    """Add a trajectory with constant velocities (N, 3) in which ``snapshots`` frames have a target one frame later."""
    out.add(
        x + velocity * np.arange(snapshots + 1)[:, None, None],
        split=split,
        dt=1.0,
        source="python tools/bench",
        velocity=np.broadcast_to(velocity, (snapshots + 1, *x.shape)),
        attributes={"viscosity": np.full(len(x), 0.01), "mass": mass},
    )


def write_trajectories(path: Path, x: np.ndarray, snapshots: int, seed: int = 0) -> None:
    """A trajectories file with one training trajectory of particles that drift apart."""
    draw = np.random.default_rng([seed, 2])
    with Writer(path, {"command": "python tools/bench"}) as out:
        velocity = draw.normal(0, DRIFT * SPACING, x.shape)
        _add_drifting(out, x, "train", snapshots, velocity, draw.uniform(0.5, 2.0, len(x)))


def write_data(path: Path, nodes: int, snapshots: int, degree: float) -> float:
    """A trajectories file of a block with a training and a shorter validation trajectory; returns the radius."""
    x = block(nodes)
    draw = np.random.default_rng(0)
    with Writer(path, {"command": "python tools/bench"}) as out:
        for split, count in (("train", snapshots), ("valid", -(-snapshots // 3))):
            velocity = draw.normal(0, DRIFT * SPACING, x.shape)
            _add_drifting(out, x, split, count, velocity, draw.uniform(0.5, 2.0, nodes))
    return radius_for(x, degree)


def config_for(path: Path, radius: float, parts: int, overrides: Sequence[str] = ()) -> Config:
    """The config of a run on a trajectories file or store of these particles."""
    data = ["data.horizon=1", f"data.radius={radius}", f"data.node_attributes=[{','.join(ATTRIBUTES)}]"]
    features = f"data.features=[{','.join(FEATURES)}]"
    return load_config(None, [f"data.path={path}", *data, features, f"partition.parts={parts}", *overrides])


def write_store(file: Path, out: Path, radius: float, parts: int) -> None:
    """Partition a trajectories file with METIS."""
    from dist_egnn.partition import store_writer

    trajectories = Trajectories(file)
    settings = config_for(file, radius, parts).data
    inputs = store_writer.build_inputs(trajectories, parts=parts, method="metis", settings=settings)
    store_writer.write_store(trajectories, out, inputs, lambda done, total: None)


def config_with_store(
    folder: Path, nodes: int, degree: float, parts: int, snapshots: int, model: dict[str, Any], halo: str
) -> Config:
    """A config whose data are a new store in ``folder``. model: values of model.*; halo: partition.halo."""
    x = block(nodes)
    radius = radius_for(x, degree)
    write_trajectories(folder / "block.h5", x, snapshots)
    write_store(folder / "block.h5", folder / "store", radius, parts)
    overrides = [f"partition.halo={halo}", *(f"model.{key}={value}" for key, value in model.items())]
    return config_for(folder / "store", radius, parts, overrides)
