"""Errors of predicted positions and properties of point clouds, as functions of arrays.

x, y: (N, 3) predicted and true positions; v: (N, 3) velocities; mass: (N,), default 1; arrays or tensors, summed in
float64. With ``comm`` a collective call: every process passes the rows that it owns and receives the value for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Failure

if TYPE_CHECKING:
    from ..distributed.comm import Comm


def to_float64(x: Any) -> np.ndarray:
    """A NumPy array of an array, or of a tensor on any device."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def _pair(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = to_float64(x), to_float64(y)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != 3:
        raise Failure(f"positions of shapes {a.shape} and {b.shape}: both must be (N, 3)")
    return a, b


def _weights(mass: Any, n: int) -> np.ndarray:
    m = np.ones(n) if mass is None else to_float64(mass)
    if m.shape != (n,):
        raise Failure(f"mass has shape {m.shape}, expected ({n},)")
    return m


def _total(comm: Comm | None, *values: Any) -> np.ndarray:
    """The values (numbers or arrays), flattened and summed over the processes in one all-reduce."""
    flat = np.concatenate([np.ravel(v) for v in values]).astype(np.float64)
    if comm is None:
        return flat
    import torch

    return comm.sum(torch.from_numpy(flat)).numpy()


def position_mse(x: Any, y: Any, comm: Comm | None = None) -> float:
    """Σ_i ‖x_i − y_i‖² / 3N, length²: the mean over nodes and components as in `train.metrics`, which sums batches."""
    a, b = _pair(x, y)
    squares, count = _total(comm, np.square(a - b).sum(), a.size)
    return float(squares / count)


def mean_absolute_error(x: Any, y: Any, comm: Comm | None = None) -> float:
    """Σ |x − y| / 3N over nodes and components, length."""
    a, b = _pair(x, y)
    absolute, count = _total(comm, np.abs(a - b).sum(), a.size)
    return float(absolute / count)


def displacement_error(x: Any, y: Any, comm: Comm | None = None) -> float:
    """Σ_i ‖x_i − y_i‖ / N, length: the mean distance of predicted and true positions."""
    a, b = _pair(x, y)
    distance, count = _total(comm, np.linalg.norm(a - b, axis=1).sum(), len(a))
    return float(distance / count)


def baselines(start: Any, v: Any, time: float, y: Any, comm: Comm | None = None) -> tuple[float, float]:
    """The MSE of the static prediction ``start`` (N, 3) and of the linear one, start + time · v."""
    return position_mse(start, y, comm), position_mse(to_float64(start) + time * to_float64(v), y, comm)


def ballistic(x: Any, v: Any, gravity: Any, box: np.ndarray | None) -> Iterator[np.ndarray]:
    """x (N, 3), then x after each step of free flight: x + v + gravity, clamped to the box (2, 3). v: length per step."""
    position, velocity = to_float64(x), to_float64(v)
    while True:
        yield position
        after = position + velocity + to_float64(gravity)
        after = after if box is None else np.clip(after, *to_float64(box))
        position, velocity = after, after - position


def walls(box: np.ndarray | None, periodic: Sequence[bool]) -> np.ndarray | None:
    """The box (2, 3), infinite along its periodic axes; None without any wall."""
    return None if box is None or all(periodic) else np.where(periodic, [[-np.inf], [np.inf]], box)


def kinetic_energy(v: Any, mass: Any = None, comm: Comm | None = None) -> float:
    """½ Σ_i m_i ‖v_i‖², mass · length² / time²."""
    velocity = to_float64(v)
    return float(_total(comm, 0.5 * (_weights(mass, len(velocity)) * np.square(velocity).sum(1)).sum())[0])


def radius_of_gyration(x: Any, mass: Any = None, comm: Comm | None = None) -> float:
    """√(Σ_i m_i ‖x_i − x̄‖² / Σ_i m_i), x̄ the centre of mass; length. Two all-reduces."""
    position = to_float64(x)
    m = _weights(mass, len(position))
    sums = _total(comm, m @ position, m.sum())
    squares = _total(comm, m @ np.square(position - sums[:3] / sums[3]).sum(1))
    return float(np.sqrt(squares[0] / sums[3]))


def rmsd(x: Any, y: Any, mass: Any = None, comm: Comm | None = None) -> float:
    """min over rotations R and translations t of √(Σ_i m_i ‖R x_i + t − y_i‖² / Σ_i m_i), length (Kabsch 1976).

    With both clouds about their centres of mass and H = Σ_i m_i x_i y_iᵀ = U S Vᵀ, the best R is V diag(1, 1, d) Uᵀ
    with d = det(V Uᵀ) = ±1, which excludes reflections. Two all-reduces, of 7 and of 10 numbers.
    """
    a, b = _pair(x, y)
    m = _weights(mass, len(a))
    sums = _total(comm, m @ a, m @ b, m.sum())
    a, b = a - sums[:3] / sums[6], b - sums[3:6] / sums[6]
    second = _total(comm, (m[:, None] * a).T @ b, m @ (np.square(a) + np.square(b)).sum(1))
    u, s, vt = np.linalg.svd(second[:9].reshape(3, 3))
    overlap = s[0] + s[1] + np.sign(np.linalg.det(u) * np.linalg.det(vt)) * s[2]
    return float(np.sqrt(max(second[9] - 2 * overlap, 0.0) / sums[6]))


def density(x: Any, mass: Any, support: float) -> np.ndarray:
    """Σ_j m_j W(‖x_i − x_j‖) at every point, j = i included: (N,), mass / length³.

    W is SPH's cubic spline (Monaghan 1992): 8 / (π support³) times 6 (q³ − q²) + 1 for q ≤ ½ and 2 (1 − q)³ for
    ½ < q ≤ 1, q = distance / support. Too low near a wall or a surface. Needs all points: gather them first.
    """
    from scipy.spatial import KDTree

    if not support > 0:
        raise Failure(f"support={support}: must be positive; 4 particle radii for fluids")
    position = to_float64(x)
    n, m = len(position), _weights(mass, len(position))
    i, j = KDTree(position).query_pairs(support, output_type="ndarray").T
    q = np.linalg.norm(position[i] - position[j], axis=1) / support
    w = np.where(q <= 0.5, 6 * (q**3 - q**2) + 1, 2 * (1 - q) ** 3)
    return 8 / (np.pi * support**3) * (m + np.bincount(i, m[j] * w, n) + np.bincount(j, m[i] * w, n))
