"""Charged particles under clipped Coulomb forces, by the semi-implicit Euler method, compiled by numba.

A separate module, because numba's cache identifies functions by module name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


# Without fastmath, operations are not reordered or fused on any processor; the elementwise loop over j is still vectorised.
# float64: rounding in float32 would add an error of its own.
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written
        return numba.njit(**options)(function)


@compiled
def clipped_forces(x: np.ndarray, q: np.ndarray, limit: float, f: np.ndarray) -> None:
    """f_j = Σ_i q_i q_j (x_j − x_i) / ‖x_j − x_i‖³, then each component clipped to ±limit. x, f: (3, N); q: (N,)."""
    n = len(q)
    f[:] = 0.0
    for i in range(n):
        x0, x1, x2, qi = x[0, i], x[1, i], x[2, i], q[i]
        for j in range(n):
            d0, d1, d2 = x[0, j] - x0, x[1, j] - x1, x[2, j] - x2
            square = d0 * d0 + d1 * d1 + d2 * d2
            size = qi * q[j] / (square * np.sqrt(square)) if square > 0.0 else 0.0
            f[0, j] += size * d0
            f[1, j] += size * d1
            f[2, j] += size * d2
    for k in range(3):
        for j in range(n):
            f[k, j] = min(max(f[k, j], -limit), limit)


@compiled
def fill(
    x: np.ndarray, v: np.ndarray, q: np.ndarray, dt: float, limit: float, every: int, xs: np.ndarray, vs: np.ndarray
) -> None:
    """Fill xs, vs (T, 3, N) with the states after 1, 1 + every, 1 + 2·every, … steps: v += dt f, then x += dt v (mass 1).

    x, v: (3, N), overwritten; q: (N,).
    """
    f = np.empty_like(x)
    for frame in range(len(xs)):
        for _ in range(every if frame else 1):
            clipped_forces(x, q, limit, f)
            v += dt * f
            x += dt * v
        xs[frame] = x
        vs[frame] = v


def simulate(
    position: np.ndarray,
    velocity: np.ndarray,
    charge: np.ndarray,
    *,
    frames: int,
    every: int,
    dt: float,
    limit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities (T, N, 3), float64, from initial ones (N, 3) and charges (N,).

    The first frame is the state after one step; others follow every ``every`` steps of dt. limit: of force components
    (clipped_forces).
    """
    x, v = np.array(position.T, dtype=np.float64, order="C"), np.array(velocity.T, dtype=np.float64, order="C")
    xs, vs = np.empty((frames, *x.shape)), np.empty((frames, *x.shape))
    fill(x, v, np.array(charge, dtype=np.float64), float(dt), float(limit), every, xs, vs)
    return xs.transpose(0, 2, 1), vs.transpose(0, 2, 1)
