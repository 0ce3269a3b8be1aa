"""A stand-in for LagrangeBench's 2D TGV, in its own layout: tracers in the Taylor-Green vortex.

The velocity u(x, t) is an exact solution of the Navier-Stokes equations in the periodic unit square. Particles follow it by
Runge-Kutta steps of fourth order. They are no SPH: they exert no force on each other, and their density is uniform in the
mean only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

VISCOSITY, WAVE = 0.01, 2 * np.pi  # Re = 100 for speed and side 1, as published; wave number k
STEP, EVERY = 0.0004, 100  # solver step and steps per frame, as published
SUBSTEPS = 4  # Runge-Kutta steps per frame


def velocity(x: np.ndarray, time: float) -> np.ndarray:
    """u (N, 2) at x (N, 2): (−cos kx sin ky, sin kx cos ky) exp(−2 ν k² t)."""
    (sx, sy), (cx, cy) = np.sin(WAVE * x).T, np.cos(WAVE * x).T
    return np.exp(-2 * VISCOSITY * WAVE**2 * time) * np.stack([-cx * sy, sx * cy], axis=1)


def trajectory(seed: int, number: int, cells: float, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (frames, cells², 2), not wrapped, and types 0 (cells²,); uniformly random in the cells of a lattice at first."""
    corner = np.stack(np.meshgrid(*[np.arange(cells)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    first = (corner + np.random.default_rng([seed, number]).uniform(size=corner.shape)) / cells
    return advect(first, frames), np.zeros(len(first), np.int64)


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


def metadata(cells: float) -> dict[str, Any]:
    """The part of metadata.json that is the flow's own."""
    solver = "stand-in: tracers in the exact velocity field, no SPH"
    about = {"case": "TGV", "solver": solver, "dt": STEP, "write_every": EVERY}
    return about | {"viscosity": VISCOSITY, "g_ext_magnitude": 0.0, "bounds": [[0.0, 1.0], [0.0, 1.0]]}
