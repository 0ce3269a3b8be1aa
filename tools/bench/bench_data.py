"""Particles for the benchmarks: a jittered block of a cubic lattice, cut off at the radius that gives a mean degree.

Legend: N nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from dist_egnn.config import Config
from dist_egnn.config import load as load_config
from dist_egnn.data.trajectories import Writer

SPACING = 0.05  # of the lattice, in length
FEATURES, ATTRIBUTES = ("viscosity", "mass", "speed"), ("viscosity", "mass")  # F = 3, K = 2, as in Fluid113K
COUNTED, SAMPLED = 2**20, 30_000
DRIFT = 0.02  # what a particle moves from frame to frame, in lattice spacings


def block(nodes: int, seed: int = 0) -> np.ndarray:
    """Positions (N, 3) float32, in the lattice's order: neighbours lie near in memory, as in a simulation's output."""
    side = math.ceil(round(nodes ** (1 / 3), 6))
    cell = np.stack(np.unravel_index(np.arange(nodes), (side, side, -(-nodes // side**2))), 1)
    jitter = np.random.default_rng(seed).uniform(-0.25, 0.25, (nodes, 3))
    return (SPACING * (cell + jitter)).astype(np.float32)


def chain(nodes: int, seed: int = 0, step: float = 3.8, reach: float = 22.0) -> np.ndarray:
    """Positions (N, 3) float32 of a random chain in a ball, in Å: a stand-in for a folded protein's backbone."""
    draw = np.random.default_rng([seed, 3])
    x = np.zeros((nodes, 3))
    for k in range(1, nodes):
        while True:
            way = draw.normal(size=3)
            x[k] = x[k - 1] + step * way / np.linalg.norm(way)
            if np.linalg.norm(x[k]) <= reach:
                break
    return x.astype(np.float32)


def radius_for(x: np.ndarray, degree: float) -> float:
    """The radius at which nodes have ``degree`` neighbours on average: to one edge; of more than COUNTED nodes as a sample of them
    has it, to a thousandth or so. 0 < degree ≤ N − 1."""
    x = np.asarray(x, dtype=np.float64)
    if len(x) > COUNTED:
        few = x[np.random.default_rng(0).integers(len(x), size=SAMPLED)]
        tree = KDTree(x, balanced_tree=False, compact_nodes=False)
        away = tree.query(few, min(round(3 * degree) + 30, len(x)))[0][:, 1:].ravel()  # the nearest is itself
        return float(np.partition(away, wanted := round(SAMPLED * degree))[wanted])
    wanted = max(round(len(x) * degree / 2), 1)
    reach = SPACING * (degree * 3 / (4 * math.pi)) ** (1 / 3)  # right for a block without a surface
    tree, most = KDTree(x), len(x) * (len(x) - 1) // 2
    while len(pairs := tree.query_pairs(reach, output_type="ndarray")) < min(wanted + 1, most):
        reach *= 1.15
    if len(pairs) <= wanted:
        return reach
    squared = np.partition(((x[pairs[:, 0]] - x[pairs[:, 1]]) ** 2).sum(1), (wanted - 1, wanted))
    return math.sqrt((squared[wanted - 1] + squared[wanted]) / 2)


def node_fields(x: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The fields of a sample with positions x: x, v, f (N, 3), a (N, 2), y, and total and centroid as a store gives them."""
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


def write_trajectories(path: Path, x: np.ndarray, snapshots: int, seed: int = 0) -> None:
    """A trajectories file in which ``snapshots`` frames have a target one frame ahead; its particles drift apart slowly."""
    draw = np.random.default_rng([seed, 2])
    velocity = draw.normal(0, DRIFT * SPACING, x.shape)
    time = np.arange(snapshots + 1)[:, None, None]
    with Writer(path, {"command": "python tools/bench"}) as out:
        out.add(
            x + velocity * time,
            split="train",
            dt=1.0,
            source="python tools/bench",
            velocity=np.broadcast_to(velocity, (snapshots + 1, *x.shape)),
            attributes={"viscosity": np.full(len(x), 0.01), "mass": draw.uniform(0.5, 2.0, len(x))},
        )


def write_data(path: Path, nodes: int, snapshots: int, degree: float) -> float:
    """A trajectories file of a block that drifts apart, a third as many snapshots for validation; returns the radius."""
    x = block(nodes)
    draw = np.random.default_rng(0)
    with Writer(path, {"command": "python tools/bench"}) as out:
        for split, count in (("train", snapshots), ("valid", -(-snapshots // 3))):
            velocity = draw.normal(0, DRIFT * SPACING, x.shape)
            frames = np.arange(count + 1)[:, None, None]
            out.add(
                x + velocity * frames,
                split=split,
                dt=1.0,
                source="python tools/bench",
                velocity=np.broadcast_to(velocity, (count + 1, *x.shape)),
                attributes={"viscosity": np.full(nodes, 0.01), "mass": draw.uniform(0.5, 2.0, nodes)},
            )
    return radius_for(x, degree)


def config_of(path: Path, radius: float, parts: int, overrides: Sequence[str]) -> Config:
    """The config of a run on such a file."""
    data = ["data.horizon=1", f"data.radius={radius}", f"data.node_attributes=[{','.join(ATTRIBUTES)}]"]
    features = f"data.features=[{','.join(FEATURES)}]"
    return load_config(None, [f"data.path={path}", *data, features, f"partition.parts={parts}", *overrides])
