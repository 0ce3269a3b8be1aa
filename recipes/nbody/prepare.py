"""Simulate charged particles in free space and write a trajectories.h5.

Positions are normal around the centre of a cluster, speeds 0.5 in random directions, charges ±1. The Coulomb force on each
particle is clipped by component; semi-implicit Euler, 5,000 steps of 0.001, a frame every 100 steps, as in the authors'
generator.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dist_egnn.data import prepare as preparation
from dist_egnn.data.trajectories import SPLITS
from dist_egnn.errors import Failure

try:
    from coulomb import simulate
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed; pip install -e '.[nbody]'", file=sys.stderr)
    raise SystemExit(2) from None

DT, STEPS, EVERY = 0.001, 5_000, 100
FRAMES = STEPS // EVERY  # after 1, 101, …, 4,901 steps
LIMIT = 0.1 / DT  # largest magnitude of a component of the force on a particle
SPEED, BOUND = 0.5, 30.0  # initial speed; cluster centres are uniform in ±BOUND
COUNTS = {"tiny": (30, 10, 10), "small": (500, 200, 200), "full": (5_000, 2_000, 2_000)}
PART_SIZE = 25  # systems written together

SCALES = {
    "tiny": "30 + 10 + 10 systems (train, valid, test): 4 s of a core, 6 MB",
    "small": "500 + 200 + 200 systems: 1 minute of a core, 106 MB",
    "full": "5,000 + 2,000 + 2,000 systems, as published: 10 minutes of a core, 1.1 GB",
}


def draw(seed: int, index: int, particles: int, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial positions and velocities (N, 3) and charges (N,) of system ``index``, a function of the arguments."""
    rng = np.random.default_rng([seed, index])
    charge = rng.choice([-1.0, 1.0], particles)
    centre = rng.uniform(-BOUND, BOUND, (clusters, 3)) if clusters > 1 else np.zeros((1, 3))
    spread = (particles / 5) ** (1 / 3) + 0.1
    position = centre[rng.integers(clusters, size=particles)] + spread * rng.normal(size=(particles, 3))
    direction = rng.normal(size=(particles, 3))
    return position, SPEED * direction / np.linalg.norm(direction, axis=1, keepdims=True), charge


def systems(
    part: int, *, seed: int, particles: int, clusters: int, counts: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    """The systems of a part, as arguments of ``Writer.add``."""
    splits = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    for index in range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(splits))):
        start = draw(seed, index, particles, clusters)
        position, velocity = simulate(*start, frames=FRAMES, every=EVERY, dt=DT, limit=LIMIT)
        yield {
            "position": position,
            "velocity": velocity,
            "attributes": {"charge": start[2]},
            "split": splits[index],
            "dt": EVERY * DT,
            "source": f"charged particles, semi-implicit Euler, system {index} of seed {seed}",
        }


def run(arguments: Sequence[str] | None = None) -> None:
    """Simulate all systems and write the file."""
    parser = preparation.parser(
        "Simulate systems of charged particles into a trajectories file.",
        SCALES,
        "python recipes/nbody/prepare.py --out data/nbody.h5 --scale tiny",
    )
    parser.add_argument(
        "--particles", type=int, default=100, help="particles of a system (default 100); time grows quadratically"
    )
    parser.add_argument(
        "--clusters", type=int, choices=(1, 3, 10), default=1, help="clusters of particles at the start (default 1)"
    )
    options = preparation.parse(parser, arguments)
    if options.particles < 2:
        raise Failure(f"--particles {options.particles}: must be at least 2")
    counts = COUNTS[options.scale]
    system_options = {
        "seed": options.seed,
        "particles": options.particles,
        "clusters": options.clusters,
        "counts": counts,
    }
    preparation.write(
        options.out,
        functools.partial(systems, **system_options),
        -(-sum(counts) // PART_SIZE),
        settings={
            "description": "N-body: charged particles in free space",
            **system_options,
            "scale": options.scale,
            "steps": STEPS,
            "step": DT,
            "every": EVERY,
            "limit": LIMIT,
            "integrator": "semi-implicit Euler",
            "versions": preparation.versions("numpy", "numba"),
        },
        workers=options.workers,
        threads=True,  # the compiled loops release Python's lock
        unit=f"{PART_SIZE} systems, part",
    )


if __name__ == "__main__":
    sys.exit(preparation.main(run))
