"""A stand-in for LagrangeBench's 2D TGV, in its own layout: tracers in the Taylor-Green vortex.

The velocity u(x, t) is an exact solution of the Navier-Stokes equations in the periodic unit square. Particles follow it by
Runge-Kutta steps of fourth order. They are no SPH: they exert no force on each other, and their density is uniform in the
mean only.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

VISCOSITY, WAVE = 0.01, 2 * np.pi  # Re = 100 for speed and side 1, as published; wave number k
STEP, EVERY = 0.0004, 100  # solver step and steps per frame, as published
SUBSTEPS = 4  # Runge-Kutta steps per frame


def velocity(x: np.ndarray, time: float) -> np.ndarray:
    """u (N, 2) at x (N, 2): (−cos kx sin ky, sin kx cos ky) exp(−2 ν k² t)."""
    (sx, sy), (cx, cy) = np.sin(WAVE * x).T, np.cos(WAVE * x).T
    return np.exp(-2 * VISCOSITY * WAVE**2 * time) * np.stack([-cx * sy, sx * cy], axis=1)


def trajectory(seed: int, number: int, side: int, frames: int) -> np.ndarray:
    """Positions (frames, side², 2), not wrapped, from uniformly random ones in the cells of a lattice."""
    rng = np.random.default_rng([seed, number])
    cells = np.stack(np.meshgrid(*[np.arange(side)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    return advect((cells + rng.uniform(size=cells.shape)) / side, frames)


def advect(x: np.ndarray, frames: int) -> np.ndarray:
    """Positions (frames, N, 2), not wrapped, of particles that start at x (N, 2) at time 0."""
    result, h = [x], STEP * EVERY / SUBSTEPS
    for k in range((frames - 1) * SUBSTEPS):
        t = k * h
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        result += [x] * ((k + 1) % SUBSTEPS == 0)
    return np.stack(result)


def write(folder: Path, counts: dict[str, int], seed: int, side: int, frames: int) -> None:
    """Write metadata.json and a file for each split; counts: their trajectories."""
    number = 0
    for split, count in counts.items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for k in range(count):
                position = trajectory(seed, number, side, frames) % 1.0
                options = {"dtype": np.float32, "compression": "gzip"}
                file.create_dataset(f"{k:05d}/position", data=position, **options)
                file[f"{k:05d}/particle_type"] = np.zeros(side**2, np.int64)
                number += 1
    metadata = {
        "case": "TGV",
        "solver": "stand-in: tracers in the exact velocity field, no SPH",
        "dim": 2,
        "dx": 1 / side,
        "dt": STEP,
        "write_every": EVERY,
        "viscosity": VISCOSITY,
        "bounds": [[0.0, 1.0], [0.0, 1.0]],
        "periodic_boundary_conditions": [True, True],
        "default_connectivity_radius": float(f"{1.45 / side:.2g}"),  # two digits, as published
        "sequence_length_train": frames - 1,
        "sequence_length_test": frames - 1,
        "num_trajs_train": counts["train"],
        "num_trajs_test": counts["test"],
        "num_particles_max": side**2,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
