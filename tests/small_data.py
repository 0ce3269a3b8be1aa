"""Small trajectories for tests, and default settings of their samples, with 10 to 15 neighbours per node."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DATA: dict[str, Any] = {"radius": 0.27, "horizon": 3, "frames": 3, "features": ["mass", "viscosity/max", "speed"]}
DATA |= {"node_attributes": ["mass"], "velocity_scale": 1.0}
FRAMES = 14
# other edges than those within a radius, by data.edges
EDGES: dict[str, dict[str, Any]] = {"knn": {"neighbours": 7}, "given": {}, "complete": {}}
EDGES = {name: {"edges": name, "radius": math.inf, **more} for name, more in EDGES.items()}


def falling_swirl(nodes: int, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Nodes of a unit cube that rotate, spread and fall: position, velocity (T, N, 3), attributes (N,)."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(size=(nodes, 3))
    mass = rng.uniform(0.5, 2.0, nodes)
    viscosity = np.full(nodes, 0.01 * (seed + 1))
    swirl = 0.03 * np.stack([0.5 - start[:, 1], start[:, 0] - 0.5, 0.2 * rng.normal(size=nodes)], 1)
    gravity = np.array([0.0, 0.0, -0.002])
    t = np.arange(FRAMES)[:, None, None]
    position = start + swirl * t + gravity * t**2 / 2 * mass[:, None]
    velocity = swirl + gravity * t * mass[:, None]
    return position, velocity, {"mass": mass, "viscosity": viscosity}


def random_pairs(nodes: int, seed: int) -> np.ndarray:
    """Edges (E, 2) between random nodes, some twice or in both directions; the last node has none."""
    pairs = np.random.default_rng(seed).integers(0, nodes - 1, (4 * nodes, 2))
    return pairs[pairs[:, 0] != pairs[:, 1]]
