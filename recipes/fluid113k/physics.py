"""Physical checks of a simulated fluid, which prepare.py and the tests apply to every trajectory.

T frames, N particles; metres, kilograms, seconds; y points up.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_erosion

from dist_egnn.evaluate.metrics import density

REST_DENSITY, GRAVITY = 1000.0, 9.81
MIN_INNER = 20  # inner particles needed for a density


def first_outside(position: np.ndarray, box: np.ndarray) -> tuple[int, int] | None:
    """Frame and number of the first particle of (T, N, 3) outside the box (2, 3); None if there is none."""
    outside = ((position < box[0]) | (position > box[1])).any(2)
    if not outside.any():
        return None
    frame, node = np.unravel_index(int(outside.argmax()), outside.shape)
    return int(frame), int(node)


def inner_density(position: np.ndarray, mass: np.ndarray, box: np.ndarray, radius: float) -> float:
    """Median density (kg/m³) of the particles away from walls and surface; NaN for fewer than 20 of them.

    Uses the engine's kernel, which ends at 4 particle radii, without wall particles. An inner particle is farther than that
    from every wall and in a cubic cell of that width whose 26 neighbours all contain particles.
    """
    support = 4 * radius
    cell = np.floor((position - position.min(0)) / support).astype(int) + 1
    occupied = np.zeros(cell.max(0) + 2, bool)
    occupied[tuple(cell.T)] = True
    deep = binary_erosion(occupied, np.ones((3, 3, 3)))[tuple(cell.T)]
    inner = deep & ((position > box[0] + support) & (position < box[1] - support)).all(1)
    return float(np.median(density(position, mass, support)[inner])) if inner.sum() >= MIN_INNER else float("nan")


def energy(position: np.ndarray, velocity: np.ndarray, mass: np.ndarray, floor: float) -> np.ndarray:
    """Kinetic energy plus potential energy above the floor, J (T,); velocity (T, N, 3) in m/s."""
    frames = zip(position, velocity, strict=True)
    return np.array([mass @ (0.5 * (v.astype(float) ** 2).sum(1) + GRAVITY * (x[:, 1] - floor)) for x, v in frames])


def energy_gain(energies: np.ndarray) -> float:
    """The largest rise above the minimum so far, relative to the first value; energies (T,)."""
    return float((energies - np.minimum.accumulate(energies)).max() / energies[0])


def trajectory_violations(
    position: np.ndarray, velocity: np.ndarray, mass: np.ndarray, box: np.ndarray, radius: float
) -> list[str]:
    """Violations of physics by a trajectory, one clause each."""
    rho = inner_density(position[-1], mass, box, radius)
    return violations(rho, energy_gain(energy(position, velocity, mass, float(box[0, 1]))))


def violations(rho: float, gain: float) -> list[str]:
    """A clause for a final density (kg/m³) that is wrong by over 5%, and for an energy rise of over 1%."""
    result = []
    if abs(rho / REST_DENSITY - 1) > 0.05:
        result.append(
            f"density {rho:.0f} kg/m³ inside the fluid at the last frame, expected {REST_DENSITY:.0f} within 5%"
        )
    if gain > 0.01:
        result.append(f"energy rises by {gain:.1%} of its first value, expected no rise")
    return result
