"""Fluid113K: simulate its scene with SPlisHSPlasH, at any size, or read the published records, into a trajectories.h5.

Full size: a closed box of 5 x 10 x 5 m with one rotated block of about 113,140 particles of radius 0.025 m, released at a
random position up to 2 m above the floor with a random velocity; 200 frames at 50 per second. engine.py simulates it.

--particles N keeps the particle radius and scales lengths by s = (N / 113140)^(1/3) and velocities and times by √s (Froude
similarity): the same splash with fewer particles in the same number of frames, √s / 50 seconds apart.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import physics
import records

from dist_egnn.data import prepare as preparation
from dist_egnn.data.trajectories import SPLITS
from dist_egnn.errors import Failure
from dist_egnn.utils.filesystem import NO_LOCKS, check_free_space

RADIUS, REFERENCE, FPS = 0.025, 113_140, 50
GRAVITY = [0.0, -physics.GRAVITY, 0.0]
BOX = np.array([5.0, 10.0, 5.0])
DROP = 2.0  # maximum height of the block above its lowest position; it lands within 40 frames
SPEED = np.array([4.0, 1.0, 4.0])
GAP = 4 * RADIUS  # free space between the block and the walls at the start
LARGE, LEG = 50_000, 20  # from LARGE particles on, an engine process simulates LEG frames
FILL = 0.8586  # mean volume of a unit cube scaled by U(0.9, 1), with probability 1/2 each axis separately
INSTALL = ".venv/bin/pip install -e '.[fluid]' (on Debian also: apt-get install libgl1 libglu1-mesa libopengl0)"
# particles, trajectories, frames
SIZES = {"tiny": (1_500, (1, 1, 1), 40), "small": (20_000, (8, 2, 2), 80), "full": (REFERENCE, (100, 20, 20), 200)}
SCALES = {
    "tiny": "1,500 particles, 1/1/1 trajectories of 40 frames: 10 s of a core, 3 MB",
    "small": "20,000 particles, 8/2/2 trajectories of 80 frames: 50 minutes of a core, 0.3 GB",
    "full": "113,140 particles, 100/20/20 trajectories of 200 frames: 1.1 hours of a core or more each, 57 GB",
}
EXAMPLE = """\
python recipes/fluid113k/prepare.py --out recipes/fluid113k/sample.h5 --particles 3200 --trajectories 4 1 1 \\
      --frames 60 --seed 3 --quantum 0.00048828125 --no-velocity --workers 2
  (reproduces the repository's sample: a minute, 5 MB)"""


@dataclass(frozen=True)
class Scene:
    """The random initial state of a trajectory. position (N, 3); velocity (3,); box (2, 3): low, high corner."""

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
    """The scene of trajectory ``index``: a function of these three numbers."""
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
            return Scene(block + rng.uniform(low, high), velocity, np.stack(box), float(np.sqrt(scale) / FPS))
    raise Failure(f"--particles {particles}: the block does not fit into the box; use 1000 or more")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Lock an engine's folder; waits for the engine of a killed run, which has the lock until it ends at its next step.

    Yields the file descriptor that an engine inherits to keep the lock.
    """
    with directory.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield file.fileno()


class Engines:
    """Engine processes, one per worker. The first failure or Ctrl-C ends all; each also ends if prepare.py is killed."""

    def __init__(self, threads: int) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.reason = threading.Lock(), ""
        # one by default: a splash is chaotic, and the engine's sums depend on the number of threads
        self.env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def stop(self, reason: str) -> None:
        with self.lock:
            self.reason = self.reason or reason
            for process in self.running:
                process.kill()

    def interrupted(self, *_: object) -> None:
        """Handle a SIGINT that only this process receives; a terminal sends it to the engines too."""
        self.stop("interrupted")
        raise KeyboardInterrupt

    def run(self, directory: Path, name: str) -> None:
        """Run engine.py on the folder. Raises Failure with the reason of the first engine that failed."""
        command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(directory)]
        with self.lock, locked(directory) as lock:
            if self.reason:
                raise Failure(self.reason)
            process = subprocess.Popen(
                command, env=self.env, stderr=subprocess.PIPE, pass_fds=(lock,), encoding="utf-8", errors="replace"
            )
            self.running.add(process)
        lines = process.communicate()[1].strip().splitlines()
        with self.lock:
            self.running.discard(process)
        if process.returncode:
            self.stop(
                f"{name}: {lines[-1] if lines else f'the engine ended with code {process.returncode}; out of memory?'}"
            )
            raise Failure(self.reason)


def engine_folder(options: argparse.Namespace, k: int) -> Path:
    """The working folder of the engine of trajectory k."""
    return options.out.with_name(options.out.name + ".parts") / f"{k:06d}.engine"


def simulate(options: argparse.Namespace, engines: Engines, k: int) -> Iterator[dict[str, Any]]:
    """Yield trajectory k, simulated. Its frames are deleted when it has been written, or after a failure before the first
    complete leg."""
    name, directory = f"trajectory {k}", engine_folder(options, k)
    state = directory / "state.npz"
    with locked(directory):
        if state.exists():  # frames after the last complete leg are simulated again
            (directory / "frames").write_text(str(np.load(state)["done"]), encoding="utf-8")
        else:
            shutil.rmtree(directory, ignore_errors=True)  # left by a killed run
    scene = draw(options.seed, k, options.particles)
    # positions and velocities, by the engine and in the part's file
    copies = 1 if state.exists() else 2
    check_free_space(directory, copies * 2 * options.frames * scene.position.size * np.dtype(np.float32).itemsize)
    directory.mkdir(exist_ok=True)
    try:
        yield simulated(options, engines, k, scene, directory, name)
        state.unlink(missing_ok=True)
    finally:
        if not state.exists():
            shutil.rmtree(directory)


def simulated(
    options: argparse.Namespace, engines: Engines, k: int, scene: Scene, directory: Path, name: str
) -> dict[str, Any]:
    """Simulate a scene in ``directory`` and write its records if requested; returns arguments of ``Writer.add``."""
    leg = LEG if len(scene.position) >= LARGE else options.frames
    np.savez(directory / "job.npz", **asdict(scene), radius=RADIUS, gravity=GRAVITY, frames=options.frames, leg=leg)
    while not (directory / "whole").exists():
        before = preparation.read_count(directory / "frames")
        engines.run(directory, name)
        if preparation.read_count(directory / "frames") <= before and not (directory / "whole").exists():
            raise Failure(f"{name}: the engine ended without a new frame, after {before} of {options.frames}")
    fields = {key: np.load(directory / f"{key}.npy") for key in ("position", "velocity", "mass", "viscosity")}
    record = records.Record(**fields, box=scene.box, dt=scene.dt)
    if outside := physics.first_outside(record.position, record.box):
        engines.stop(f"{name}: particle {outside[1]} is outside the box at frame {outside[0]}; use another --seed")
        raise Failure(engines.reason)
    record = check_and_round(record, name, options.quantum)
    if options.records:
        records.write(options.records, k + 1, record, RADIUS)
    return writer_arguments(record, k, options, f"SPlisHSPlasH {importlib.metadata.version('pysplishsplash')}")


def read_record(options: argparse.Namespace, numbers: Sequence[int], k: int) -> Iterator[dict[str, Any]]:
    """Yield trajectory k, read from the records."""
    record = records.read(options.from_records, numbers[k], options.frames)
    name = f"sim_{numbers[k]:04d}"
    if outside := physics.first_outside(record.position, record.box):
        print(f"warning: {name}: particle {outside[1]} is outside the box at frame {outside[0]}", file=sys.stderr)
    yield writer_arguments(check_and_round(record, name, options.quantum), k, options, f"records {name}")


def check_and_round(record: records.Record, name: str, quantum: float) -> records.Record:
    """Print a warning for each violation of physics; returns the trajectory with rounded positions and velocities."""
    for violation in physics.trajectory_violations(record.position, record.velocity, record.mass, record.box, RADIUS):
        print(f"warning: {name}: {violation}", file=sys.stderr)
    if not quantum:
        return record
    position, velocity = (np.rint(field / quantum) * quantum for field in (record.position, record.velocity))
    return replace(record, position=position, velocity=velocity)


def writer_arguments(record: records.Record, k: int, options: argparse.Namespace, source: str) -> dict[str, Any]:
    """Arguments of ``Writer.add``."""
    return {
        "position": record.position,
        "velocity": None if options.no_velocity else record.velocity,
        "attributes": {"viscosity": record.viscosity, "mass": record.mass},
        "box": record.box,
        "gravity": GRAVITY,
        "dt": record.dt,
        "split": options.splits[k],
        "source": source,
    }


def split_counts(count: int) -> tuple[int, int, int]:
    """Numbers of training, validation and test trajectories, as 100:20:20; at least one each from 3 on."""
    valid, test = (max(1, round(count / 7)) if count > minimum else 0 for minimum in (1, 2))
    return count - valid - test, valid, test


def prepare(options: argparse.Namespace) -> None:
    """Write the file and, if requested, the records."""
    settings = {"trajectories": options.trajectories, "frames": options.frames, "quantum": options.quantum}
    settings["gravity"] = GRAVITY
    settings["velocity_unit"] = "forward difference: m per frame" if options.no_velocity else "m/s"
    write = functools.partial(preparation.write, options.out, workers=options.workers, threads=True, unit="trajectory")
    if options.from_records:
        numbers = options.numbers[: len(options.splits)]
        settings |= {
            "description": "Fluid113K: read from records",
            "numbers": numbers,
            "folder": str(options.from_records.resolve()),
            "versions": preparation.versions("numpy", "msgpack", "msgpack-numpy", "zstandard"),
        }
        write(functools.partial(read_record, options, numbers), len(numbers), settings=settings)
        return
    if importlib.util.find_spec("pysplishsplash") is None:
        raise Failure(f"SPlisHSPlasH is not installed; {INSTALL}")
    settings |= {
        "description": f"Fluid113K scene at {options.particles} particles: a block of fluid dropped into a box",
        "seed": options.seed,
        "particles": options.particles,
        "threads": options.threads,
        "records": bool(options.records),
        "versions": preparation.versions("pysplishsplash", "numpy"),
    }
    engines = Engines(options.threads)
    before = signal.signal(signal.SIGINT, engines.interrupted)
    try:
        write(
            functools.partial(simulate, options, engines),
            len(options.splits),
            settings=settings,
            steps=preparation.Steps(
                "frames",
                [options.frames] * len(options.splits),
                lambda k: preparation.read_count(engine_folder(options, k) / "frames"),
            ),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    for k in range(len(options.splits)) if options.records else ():
        for path in records.paths(options.records, k + 1):
            if not path.exists():
                raise Failure(f"{path}: missing; an interrupted run wrote it to another --records folder; move it here")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and apply --scale. Raises Failure for invalid values."""
    parser = preparation.parser(
        "Simulate the scene of Fluid113K with SPlisHSPlasH, at any size, or read its published records.",
        SCALES,
        EXAMPLE,
    )
    parser.set_defaults(scale=None)  # to detect whether it was given
    option = parser.add_argument
    option("--particles", type=int, help="mean particles of a trajectory, instead of the scale's")
    option(
        "--trajectories",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VALID", "TEST"),
        help="number of trajectories, instead of the scale's; with --from-records the first ones (default all, as 100:20:20)",
    )
    option(
        "--frames", type=int, help="frames of a trajectory, instead of the scale's; with --from-records the first ones"
    )
    option(
        "--threads",
        type=int,
        help="threads of a simulation (default 1; several are faster, but the same seed then gives different bytes)",
    )
    option(
        "--quantum",
        type=float,
        default=0.0,
        help="round m and m/s to multiples of this; a power of two compresses best",
    )
    option("--no-velocity", action="store_true", help="omit velocities; readers use forward differences")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--records", type=Path, metavar="DIR", help="also write the published files sim_*.msgpack.zst")
    source.add_argument("--from-records", type=Path, metavar="DIR", help="read such files instead of simulating")
    options = preparation.parse(parser, arguments)
    for name, low in (("particles", 1), ("frames", 2), ("threads", 1), ("quantum", 0)):
        if (value := getattr(options, name)) is not None and value < low:
            raise Failure(f"--{name} {value}: must be at least {low}")
    if options.from_records:
        for name in ("scale", "particles", "threads"):
            if getattr(options, name) is not None:
                raise Failure(
                    f"--{name} is for simulations and cannot be combined with --from-records; remove one of them"
                )
        options.numbers = records.numbers(options.from_records)
        options.trajectories = options.trajectories or split_counts(len(options.numbers))
        if sum(options.trajectories) > (available := len(options.numbers)):
            raise Failure(
                f"--trajectories: {sum(options.trajectories)} requested, {options.from_records} has {available}"
            )
    else:
        options.threads = options.threads or 1
        for name, value in zip(("particles", "trajectories", "frames"), SIZES[options.scale or "small"], strict=True):
            if getattr(options, name) is None:
                setattr(options, name, value)
    if min(options.trajectories) < 0 or not sum(options.trajectories):
        raise Failure("--trajectories: three counts, at least one above 0")
    if options.records and options.frames < records.FILES:
        raise Failure(
            f"--frames {options.frames}: --records distributes them over {records.FILES} files; use {records.FILES} or more"
        )
    options.splits = [split for split, count in zip(SPLITS, options.trajectories, strict=True) for _ in range(count)]
    return options


def run(arguments: Sequence[str] | None) -> None:
    prepare(parse(arguments))


if __name__ == "__main__":
    sys.exit(preparation.main(run))
