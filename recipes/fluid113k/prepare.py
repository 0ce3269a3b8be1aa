"""Simulate the scene of Fluid113K with SPlisHSPlasH, at any size, into a trajectories.h5.

At full size: a closed box of 5 x 10 x 5 m and in it one rotated block of about 113,140 particles of radius
0.025 m, let go at a random place up to 2 m above the floor with a random velocity; 200 frames at 50 per second.
What the engine does with it stands in engine.py.

--particles N keeps the particle radius and scales every length by s = (N / 113140)^(1/3) and every velocity and time
by √s, so that gravity acts alike (Froude similarity): the same splash, made of fewer particles, in as many frames. The
time from frame to frame is √s / 50 seconds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from dist_egnn.errors import Failure
from dist_egnn.trajectories import SPLITS, Writer

RADIUS, REFERENCE, FPS = 0.025, 113_140, 50
BOX = np.array([5.0, 10.0, 5.0])
DROP = 2.0  # the block's lowest point starts at most this far above its lowest place: it lands within 40 frames
SPEED = np.array([4.0, 1.0, 4.0])
GAP = 4 * RADIUS  # free space between the block and the walls at the start
FILL = 0.8586  # mean volume of a unit cube scaled by U(0.9, 1), half the time by axis, half the time as a whole
INSTALL = "pip install -e '.[fluid]' (on Debian also: apt-get install libgl1 libglu1-mesa libopengl0)"

EPILOG = """\
example, the sample of the repository (a minute, 5 MB):
  python recipes/fluid113k/prepare.py --out recipes/fluid113k/sample.h5 --particles 3200 --trajectories 4 1 1 \\
      --frames 60 --seed 3 --quantum 0.00048828125 --no-velocity --workers 2

A trajectory of 20,000 particles and 200 frames takes 6 minutes of a core and 73 MB; one of 113,140 takes 1 to 2 hours of
a core, 0.5 GB of memory and 0.4 GB in the file. All 140: 140 to 280 hours of a core, 60 GB.
"""


@dataclass(frozen=True)
class Scene:
    """What the random numbers of a trajectory decide. position (N, 3); velocity (3,); box (2, 3): low, high corner."""

    position: np.ndarray
    velocity: np.ndarray
    box: np.ndarray
    dt: float


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix, uniform over all rotations."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def draw(seed: int, index: int, particles: int) -> Scene:
    """The scene of trajectory ``index``: the same for the same three numbers."""
    rng = np.random.default_rng([seed, index])
    scale = (particles / REFERENCE) ** (1 / 3)
    box = np.array([-0.5, 0.0, -0.5]) * BOX * scale, np.array([0.5, 1.0, 0.5]) * BOX * scale
    side = (particles / FILL) ** (1 / 3)  # in particles
    for _ in range(1000):
        stretch = rng.uniform(0.9, 1, 3) if rng.random() < 0.5 else np.full(3, rng.uniform(0.9, 1))
        lattice = np.stack(np.meshgrid(*(np.arange(n) for n in np.rint(side * stretch)), indexing="ij"), -1)
        block = lattice.reshape(-1, 3) * (2 * RADIUS) @ random_rotation(rng).T
        low = box[0] + GAP - block.min(0)
        high = box[1] - GAP - block.max(0)
        high[1] = min(high[1], low[1] + DROP * scale)
        if (low <= high).all():
            velocity = rng.uniform(-SPEED, SPEED) * np.sqrt(scale)
            return Scene(block + rng.uniform(low, high), velocity, np.stack(box), np.sqrt(scale) / FPS)
    raise Failure(f"--particles {particles}: the block does not fit into so small a box; take 1000 or more")


class Simulations:
    """Engine processes, ``workers`` at a time; none outlives the ``with`` block."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.root, self.options = root, options
        self.pool = ThreadPoolExecutor(options.workers)
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.closed = threading.Lock(), False
        threads = max(1, len(os.sched_getaffinity(0)) // options.workers)
        # idle OpenMP threads that spin slow down everything else on the machine
        self.env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}

    def __enter__(self) -> Simulations:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            for process in self.running:
                process.kill()
        self.pool.shutdown(cancel_futures=True)

    def _simulate(self, index: int) -> tuple[Scene, Path]:
        scene = draw(self.options.seed, index, self.options.particles)
        directory = self.root / str(index)
        directory.mkdir()
        np.savez(directory / "job.npz", **vars(scene), radius=RADIUS, frames=self.options.frames)
        command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(directory)]
        with self.lock:
            if self.closed:
                raise Failure(f"trajectory {index}: not started")
            process = subprocess.Popen(command, env=self.env, stderr=subprocess.PIPE, text=True)
            self.running.add(process)
        message = process.communicate()[1].strip()
        with self.lock:
            self.running.discard(process)
        if process.returncode:
            reason = (
                message.splitlines()[-1] if message else f"the engine ended with code {process.returncode}; memory?"
            )
            raise Failure(f"trajectory {index}: {reason}")
        return scene, directory

    def results(self, count: int) -> Iterator[tuple[Scene, Path]]:
        """The scenes 0…count−1 and the folders with their frames, in this order."""
        futures = [self.pool.submit(self._simulate, index) for index in range(count)]
        while futures:
            yield futures.pop(0).result()


def add(out: Writer, split: str, scene: Scene, directory: Path, options: argparse.Namespace) -> int:
    """Check a simulated trajectory, round it, append it to the file; its number of particles."""
    names = ("position", "velocity", "mass", "viscosity")
    position, velocity, mass, viscosity = (np.load(directory / f"{name}.npy") for name in names)
    outside = ((position < scene.box[0]) | (position > scene.box[1])).any(2)
    if outside.any():
        frame, node = np.argwhere(outside)[0]
        raise Failure(
            f"trajectory {directory.name}: particle {node} is outside the box at frame {frame}; take another --seed"
        )
    for field in (position, velocity) if options.quantum else ():
        np.multiply(np.rint(field / options.quantum), options.quantum, out=field)
    out.add(
        position,
        split=split,
        dt=scene.dt,
        source=f"SPlisHSPlasH {importlib.metadata.version('pysplishsplash')}",
        velocity=None if options.no_velocity else velocity,
        attributes={"viscosity": viscosity, "mass": mass},
        box=scene.box,
    )
    return len(mass)


def prepare(options: argparse.Namespace) -> None:
    """Simulate every trajectory and write the file."""
    splits = [split for split, count in zip(SPLITS, options.trajectories, strict=True) for _ in range(count)]
    meta = {
        "description": f"Fluid113K scene at {options.particles} particles: a block of fluid dropped into a box",
        "command": shlex.join(["python", *sys.argv]),
        "seed": options.seed,
        "particles": options.particles,
        "quantum": options.quantum,
        "velocity_unit": "forward difference: m per frame" if options.no_velocity else "m/s",
        "versions": {name: importlib.metadata.version(name) for name in ("pysplishsplash", "numpy")}
        | {"python": platform.python_version()},
    }
    start = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # beside the output: at full size a trajectory is half a gigabyte before it is compressed
    with (
        tempfile.TemporaryDirectory(prefix=f"{options.out.name}.", dir=options.out.parent) as root,
        Writer(options.out, meta) as out,
        Simulations(Path(root), options) as simulations,
    ):
        for done, (scene, directory) in enumerate(simulations.results(len(splits)), 1):
            nodes = add(out, splits[done - 1], scene, directory, options)
            shutil.rmtree(directory)
            spent = time.monotonic() - start
            left = datetime.timedelta(seconds=round(spent / done * (len(splits) - done)))
            name = f"trajectory {done} of {len(splits)} ({splits[done - 1]})"
            print(f"{name}: {nodes} particles, {spent:.0f} s spent, about {left} left", flush=True)
    print(f"{options.out}: {len(splits)} trajectories, {options.out.stat().st_size / 1e6:.1f} MB")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise Failure(f"{message}; see --help")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises Failure for a value that cannot be."""
    parser = Parser(
        description="Simulate the scene of Fluid113K with SPlisHSPlasH, at any size, into a trajectories file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--out", type=Path, required=True, help="the file to write")
    option("--particles", type=int, default=REFERENCE, help=f"mean particles of a trajectory (default {REFERENCE})")
    option(
        "--trajectories",
        type=int,
        nargs=3,
        default=(100, 20, 20),
        metavar=("TRAIN", "VALID", "TEST"),
        help="how many (default 100 20 20)",
    )
    option("--frames", type=int, default=200, help="frames of a trajectory (default 200: 4 s at full size)")
    option("--seed", type=int, default=0, help="decides the scenes, together with --particles (default 0)")
    option("--workers", type=int, default=1, help="simulations at a time; they share the CPU cores (default 1)")
    option("--quantum", type=float, default=0.0, help="round m and m/s to multiples of this; a power of two packs best")
    option("--no-velocity", action="store_true", help="leave velocities out: readers take forward differences")
    options = parser.parse_args(arguments)
    for name, low in (("particles", 1), ("frames", 2), ("workers", 1), ("seed", 0), ("quantum", 0)):
        if getattr(options, name) < low:
            raise Failure(f"--{name} {getattr(options, name)}: must be at least {low}")
    if min(options.trajectories) < 0 or not sum(options.trajectories):
        raise Failure("--trajectories: three counts, not all of them 0")
    return options


def main() -> int:
    try:
        options = parse()
        if importlib.util.find_spec("pysplishsplash") is None:
            raise Failure(f"SPlisHSPlasH is not installed; {INSTALL}")
        prepare(options)
    except (Failure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
