"""What a simulated fluid has to obey: prepare.py holds every trajectory to it, and so do the tests.

T frames, N particles; metres, kilograms, seconds; y points up.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_erosion

from dist_egnn.evaluate.metrics import density

REST_DENSITY, GRAVITY = 1000.0, 9.81
FEWEST = 20  # inner particles, to speak of their density


def first_outside(position: np.ndarray, box: np.ndarray) -> tuple[int, int] | None:
    """Frame and number of the first particle of (T, N, 3) outside the box (2, 3); None if there is none."""
    outside = ((position < box[0]) | (position > box[1])).any(2)
    if not outside.any():
        return None
    frame, node = np.unravel_index(int(outside.argmax()), outside.shape)
    return int(frame), int(node)


def inner_density(position: np.ndarray, mass: np.ndarray, box: np.ndarray, radius: float) -> float:
    """Median density (kg/m³) of the particles away from walls and surface; NaN if they are fewer than 20.

    By the engine's kernel, which ends at 4 particle radii, without its wall particles: hence away from walls, that is, in
    a cubic cell as wide as the kernel's support of which all 26 neighbours hold particles too, and farther
    than the support from every wall.
    """
    support = 4 * radius
    cell = np.floor((position - position.min(0)) / support).astype(int) + 1
    taken = np.zeros(cell.max(0) + 2, bool)
    taken[tuple(cell.T)] = True
    deep = binary_erosion(taken, np.ones((3, 3, 3)))[tuple(cell.T)]
    inner = deep & ((position > box[0] + support) & (position < box[1] - support)).all(1)
    return float(np.median(density(position, mass, support)[inner])) if inner.sum() >= FEWEST else float("nan")


def energy(position: np.ndarray, velocity: np.ndarray, mass: np.ndarray, floor: float) -> np.ndarray:
    """Kinetic energy plus potential energy above the floor, J (T,); velocity (T, N, 3) in m/s."""
    frames = zip(position, velocity, strict=True)
    return np.array([mass @ (0.5 * (v.astype(float) ** 2).sum(1) + GRAVITY * (x[:, 1] - floor)) for x, v in frames])


def energy_gain(energies: np.ndarray) -> float:
    """The largest rise above the least value so far, as a share of the first value; energies (T,)."""
    return float((energies - np.minimum.accumulate(energies)).max() / energies[0])


def complaints(
    position: np.ndarray, velocity: np.ndarray, mass: np.ndarray, box: np.ndarray, radius: float
) -> list[str]:
    """What is doubtful about a trajectory, a clause each."""
    rho = inner_density(position[-1], mass, box, radius)
    return doubts(rho, energy_gain(energy(position, velocity, mass, float(box[0, 1]))))


def doubts(rho: float, gain: float) -> list[str]:
    """A clause for a density (kg/m³) at the end that is off by over 5%, and for energy that rises by over 1%."""
    found = []
    if abs(rho / REST_DENSITY - 1) > 0.05:
        found.append(
            f"density {rho:.0f} kg/m³ inside the fluid at the last frame, expected {REST_DENSITY:.0f} within 5%"
        )
    if gain > 0.01:
        found.append(f"energy rises by {gain:.1%} of its first value, expected no rise")
    return found
