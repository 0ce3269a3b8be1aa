"""A stand-in for LagrangeBench's dam break: SPlisHSPlasH in two dimensions, through recipes/water3d/engine.py.

As published: a basin of about 5.366 x 2, gravity 1, a column of water of about 2 x 1 in the corner, a layer of wall particles
around the basin, and a periodic box that is larger by three spacings on each side. Width and height of the column are random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dist_egnn.errors import Failure

BASIN = np.array([5.36, 2.0])
STEP, EVERY = 0.003, 10  # step of the engine, steps per frame
ENGINE = Path(__file__).parents[1] / "water3d" / "engine.py"


def column(seed: int, number: int, cells: float) -> np.ndarray:
    """Width and height (2,) of the column, in whole spacings 1 / cells."""
    return np.rint(np.random.default_rng([seed, number]).uniform(0.8, 1.2, 2) * [2, 1] * cells) / cells


def walls(cells: float) -> np.ndarray:
    """Particles (M, 2) on the boundary of the basin."""
    n = np.rint(BASIN * cells).astype(int)
    grid = np.stack(np.meshgrid(np.arange(n[0] + 1), np.arange(n[1] + 1), indexing="ij"), axis=-1).reshape(-1, 2)
    return grid[((grid == 0) | (grid == n)).any(1)] / cells


def trajectory(seed: int, number: int, cells: float, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (frames, N, 2) and types (N,): 0 water, 1 wall. Raises Failure if the engine fails or water escapes."""
    d = 1 / cells
    low, high = np.full(2, d), d + column(seed, number, cells)  # a spacing from the wall, where it would be compressed
    job: dict[str, Any] = {"plane": True, "radius": d / 2, "dt": STEP * EVERY, "steps": EVERY, "frames": frames}
    job |= {"box": [[0, 0, -0.5], [*BASIN, 0.5]], "block": [[*low, -0.5], [*high, 0.5]]}
    job |= {"velocity": [0, 0, 0], "gravity": [0, -1, 0]}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        command, env = [sys.executable, str(ENGINE), folder], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Failure(
                f"dam break {number}: {(done.stderr.strip().splitlines() or [f'code {done.returncode}'])[-1]}"
            )
        water = np.load(Path(folder, "position.npy"))[..., :2]
    if ((water < 0) | (water > BASIN)).any():
        raise Failure(f"dam break {number}: a particle left the basin; use another --seed")
    wall = walls(cells)
    position = np.concatenate([water, np.broadcast_to(wall, (frames, *wall.shape))], axis=1) + 3 * d
    return position, np.repeat([0, 1], [water.shape[1], len(wall)])


def metadata(cells: float) -> dict[str, Any]:
    """The part of metadata.json that is the flow's own."""
    bounds = [[0.0, side + 6 / cells] for side in BASIN.tolist()]
    about = {"case": "DB", "solver": "stand-in: DFSPH of SPlisHSPlasH", "dt": STEP, "write_every": EVERY}
    return about | {"g_ext_magnitude": 1.0, "bounds": bounds}
