"""Write a synthetic trajectories.h5 of many particles, slab by slab: a jittered lattice of slowly drifting particles.

    python tools/bench/large.py NODES OUT.h5

Two frames, which give one training snapshot; positions as in bench_data.block. Memory is that of one slab, for any NODES.
Prints the radius at which an inner particle has 15 neighbours on average.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import h5py
import numpy as np
from bench_data import DRIFT, SPACING, block
from scipy.spatial import KDTree

from dist_egnn.data.trajectories import Writer

SLAB = 1 << 18  # particles drawn at once
DEGREE = 15.0


def inner_radius() -> float:
    """The radius at which particles far from the surface have DEGREE neighbours on average."""
    x = block(30**3)
    inner = x[((x > 5 * SPACING) & (x < 25 * SPACING)).all(1)]
    pairs = KDTree(x).sparse_distance_matrix(KDTree(inner), 2 * SPACING, output_type="ndarray")
    return float(np.sort(pairs["v"])[round((DEGREE + 1) * len(inner)) - 1])  # + 1: the particle itself


def slab(nodes: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Particles lo…hi of the lattice: positions and velocities (n, 3), mass (n,)."""
    side = math.ceil(round(nodes ** (1 / 3), 6))
    draw = np.random.default_rng([0, lo])
    cell = np.stack(np.unravel_index(np.arange(lo, hi), (side, side, -(-nodes // side**2))), 1)
    x = SPACING * (cell + draw.uniform(-0.25, 0.25, cell.shape))
    return x, draw.normal(0, DRIFT * SPACING, x.shape), draw.uniform(0.5, 2.0, hi - lo)


def write(path: Path, nodes: int) -> None:
    """Write the file as trajectories.Writer does, in smaller chunks."""
    with Writer(path, {"command": f"tools/bench/large.py {nodes}", "kind": "synthetic"}) as out:
        group = out.group.create_group("000000")
        group.attrs.update(split="train", dt=1.0, source="synthetic: lattice with noise", periodic=False)
        chunk = min(SLAB, nodes)

        def dataset(name: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> h5py.Dataset:
            return group.create_dataset(name, shape, np.float32, chunks=chunks, shuffle=True, compression="lzf")

        position, velocity = (dataset(name, (2, nodes, 3), (2, chunk, 1)) for name in ("position", "velocity"))
        mass, viscosity = (dataset(f"attributes/{name}", (nodes,), (chunk,)) for name in ("mass", "viscosity"))
        for lo in range(0, nodes, SLAB):
            hi = min(lo + SLAB, nodes)
            x, v, mass[lo:hi] = slab(nodes, lo, hi)
            position[:, lo:hi], velocity[:, lo:hi] = np.stack([x, x + v]), np.stack([v, v])
            viscosity[lo:hi] = np.full(hi - lo, 0.01, np.float32)
            out.sink.check()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(options.out, options.nodes)
    print(
        f"{options.out}: {options.nodes:,} particles (synthetic); 15 neighbours each at --radius {inner_radius():.5f}"
    )
