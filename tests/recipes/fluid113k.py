"""Shared by the tests of recipes/fluid113k: its modules, a falling block, records in the authors' format."""

from __future__ import annotations

import sys
from pathlib import Path

import msgpack
import numpy as np
import recipe_modules
import zstandard

RECIPE = Path(__file__).parents[2] / "recipes" / "fluid113k"
RADIUS = 0.025


physics, records, prepare, check, engine = (
    recipe_modules.load("fluid113k", name, name) for name in ("physics", "records", "prepare", "check", "engine")
)
del sys.modules["prepare"]  # each recipe has a prepare.py


def run(*arguments: object) -> int:
    return prepare.preparation.main(prepare.run, [str(argument) for argument in arguments])


def block(n: int = 12, frames: int = 20, dt: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """A cube of n³ particles at rest density in free fall: position, velocity (T, n³, 3)."""
    lattice = np.stack(np.meshgrid(*[np.arange(n) * 2 * RADIUS] * 3, indexing="ij"), -1).reshape(-1, 3)
    t = dt * np.arange(frames)[:, None, None]
    gravity = np.array([0, -9.81, 0])
    position = lattice + [-0.3, 1.5, -0.3] + gravity * t**2 / 2
    return position.astype(np.float32), np.broadcast_to(gravity * t, position.shape).astype(np.float32)


MASS = 1000 * (2 * RADIUS) ** 3
BOX = np.array([[-0.5, 0, -0.5], [0.5, 2.5, 0.5]], np.float32)


# ---- records of other programs: msgpack and zstd only, arrays encoded by hand


def raw(array: np.ndarray) -> dict:
    head = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape)}
    return head | {b"data": array.tobytes()}


def frame_of(number: int, t: int, position: np.ndarray, velocity: np.ndarray, first: bool) -> dict:
    n = len(position)
    corners = np.array(np.meshgrid(*BOX.T)).reshape(3, 8).T.copy()
    walls = {"box": raw(corners), "box_normals": raw(-np.sign(corners))}
    return (walls if first else {}) | {
        "frame_id": {b"nd": False, b"type": "<i8", b"data": t.to_bytes(8, "little")},
        "scene_id": f"sim_{number:04d}",
        "pos": raw(position),
        "vel": raw(velocity),
        "m": raw(np.full(n, MASS, np.float32)),
        "viscosity": raw(np.full(n, 0.01, np.float32)),
    }


def pack(path: Path, frames: object) -> None:
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress(msgpack.packb(frames, use_bin_type=True)))


def write_authors_records(folder: Path, number: int, position: np.ndarray, velocity: np.ndarray) -> list[Path]:
    """20 frames in the authors' layout: two in each of the first four files, one in each of the other twelve."""
    folder.mkdir(exist_ok=True)
    paths, t = [folder / f"sim_{number:04d}_{k:02d}.msgpack.zst" for k in range(16)], 0
    for k, path in enumerate(paths):
        count = 2 if k < 4 else 1
        pack(path, [frame_of(number, s, position[s], velocity[s], s == t) for s in range(t, t + count)])
        t += count
    return paths
