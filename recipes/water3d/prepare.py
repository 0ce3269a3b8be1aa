"""Convert Water-3D of GNS ("learning to simulate"), or a simulated stand-in, into a trajectories.h5."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gns
import numpy as np

from dist_egnn.data import prepare as preparation
from dist_egnn.data.trajectories import SPLITS
from dist_egnn.errors import Failure
from dist_egnn.utils.filesystem import check_free_space

COUNTS = {"tiny": (4, 1, 1), "small": (20, 4, 4), "full": (1000, 100, 100)}  # trajectories by split
SIMULATED = {"tiny": (1000, 60), "small": (8000, 200), "full": (8000, 801)}  # particles and frames of the stand-in
RADIUS, DT, WATER = 0.012, 0.005, 5.0  # of the stand-in: particle radius, time between frames, GNS' type of water
GRAVITY = [0.0, -9.81, 0.0]  # of the stand-in; GNS' files do not name theirs
SCALES = {
    "tiny": "4 + 1 + 1 trajectories. GNS: 0.45 GB to fetch, 8 s of a core, 0.3 GB. Stand-in (1,000 particles, 60 frames): "
    "3 s, 2.4 MB",
    "small": "20 + 4 + 4. GNS: 2.1 GB to fetch, 40 s of a core, 1.3 GB. Stand-in (8,000 particles, 200 frames): "
    "7 minutes of a core, 0.35 GB",
    "full": "1,000 + 100 + 100. GNS: 90 GB to fetch, half an hour of a core, 57 GB. Stand-in (8,000 particles, 801 frames): "
    "20 hours of a core, 57 GB. Extrapolated from one trajectory",
}
EXAMPLE = "python recipes/water3d/prepare.py --scale small --source data/Water-3D --download --out data/water3d.h5"


def scene(seed: int, number: int, particles: int) -> dict[str, Any]:
    """A block of random shape, position and velocity in a cube, a function of the three arguments.

    The cube has about the fill level of GNS' box: side 0.8 for 8,000 particles.
    """
    rng = np.random.default_rng([seed, number])
    half = 0.4 * (particles / 8000) ** (1 / 3)
    box = np.array([[0.5 - half] * 3, [0.5 + half] * 3])
    stretch = rng.uniform(0.8, 1.25, 3)
    shape = np.rint((particles / stretch.prod()) ** (1 / 3) * stretch)
    side = (shape + 1) * 2 * RADIUS  # the engine leaves half a particle diameter free on each side
    low = rng.uniform(box[0], box[1] - side)
    block = np.stack([low, low + side])
    return {"box": box.tolist(), "block": block.tolist(), "velocity": rng.uniform(-0.5, 0.5, 3).tolist()}


@dataclass(frozen=True)
class Simulations:
    """The trajectories of the stand-in, each from its own engine process. scratch: a folder for temporary files."""

    seed: int
    splits: list[str]
    particles: int
    frames: int
    scratch: Path

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield arguments of ``Writer.add``. Raises Failure if the engine fails or a particle leaves the box."""
        job, folder = scene(self.seed, number, self.particles), self.folder(number)
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
        # a block has up to 20% more particles; frames of the engine and of the part's file
        check_free_space(folder, int(1.2 * 2 * 12 * self.particles * self.frames))
        folder.mkdir()
        try:
            yield self.simulate(number, job, folder)
        finally:
            shutil.rmtree(folder)

    def folder(self, number: int) -> Path:
        """The working folder of a trajectory's engine."""
        return self.scratch / f"{number:06d}.engine"

    def reached(self, number: int) -> int:
        """The number of finished frames of a trajectory."""
        return preparation.read_count(self.folder(number) / "frames")

    def simulate(self, number: int, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        timing = {"radius": RADIUS, "dt": DT, "steps": 2, "frames": self.frames, "gravity": GRAVITY}
        (folder / "job.json").write_text(json.dumps(job | timing), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(folder)]
        # one thread: the engine's sums depend on the number of threads
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"the engine ended with code {done.returncode}"])[-1]
            raise Failure(f"trajectory {number}: {reason}")
        position = np.load(folder / "position.npy")
        box = np.array(job["box"])
        if ((position < box[0]) | (position > box[1])).any():
            raise Failure(f"trajectory {number}: a particle left the box; use another --seed")
        return {
            "position": position,
            "split": self.splits[number],
            "dt": DT,
            "source": f"stand-in for GNS Water-3D: SPlisHSPlasH {preparation.versions('pysplishsplash')['pysplishsplash']}",
            "attributes": {"type": np.full(position.shape[1], WATER)},
            "box": box,
            "gravity": GRAVITY,
        }


def require_modules(remedy: str, *modules: str) -> None:
    """Raise Failure for the first module that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Failure(f"Python module '{module}' is not installed; {remedy}")


def run(arguments: Sequence[str] | None = None) -> None:
    """Convert or simulate the data and write the file."""
    parser = preparation.parser(__doc__ or "", SCALES, EXAMPLE)
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="folder with metadata.json and {train,valid,test}.tfrecord of GNS, or .h5 in place of .tfrecord; "
        "splishsplash: a stand-in, blocks of water released in a box (default at scale tiny)",
    )
    parser.add_argument(
        "--download", action="store_true", help="first fetch missing files into DIR, as much as the scale needs"
    )
    options = preparation.parse(parser, arguments)
    source = "splishsplash" if (options.source, options.scale) == (None, "tiny") else options.source
    if source is None or (options.download and source == "splishsplash"):
        choice = "DIR" if options.download else "DIR, or --source splishsplash for a simulated stand-in"
        raise Failure(f"--scale {options.scale}: give the folder of GNS' files: --source {choice}; see --help")
    settings = {"recipe": "water3d", "scale": options.scale, "seed": options.seed}
    full = options.scale == "full"
    limits = COUNTS[options.scale]
    make: Any
    steps = None
    if source == "splishsplash":
        require_modules("pip install -e '.[fluid]', or use GNS' files with --source DIR", "pysplishsplash")
        splits = [split for split, count in zip(SPLITS, limits, strict=True) for _ in range(count)]
        scratch = options.out.with_name(options.out.name + ".parts")
        make = Simulations(options.seed, splits, *SIMULATED[options.scale], scratch)
        steps = preparation.Steps("frames", [make.frames] * len(splits), make.reached)
        count, packages = len(splits), ["pysplishsplash"]
        settings |= {"source": source, "gravity": GRAVITY}
    else:
        folder = Path(source)
        if options.download or any(folder.glob("*.tfrecord*")):
            require_modules("pip install -e '.[water3d]'", "google", "google.protobuf", "google_crc32c")
        if options.download:
            folder.mkdir(parents=True, exist_ok=True)
            gns.fetch(folder, "metadata.json")
            for split, limit in zip(SPLITS, limits, strict=True):
                gns.fetch(folder, f"{split}.tfrecord", None if full else limit)
        make, content = gns.find(folder, (sys.maxsize,) * 3 if full else limits, whole=full)
        count, packages = len(make.locations), []
        settings |= {"source": "GNS"} | content
    preparation.write(
        options.out,
        make,
        count,
        settings=settings | {"versions": preparation.versions("numpy", "h5py", *packages)},
        workers=options.workers,
        threads=source == "splishsplash",
        unit="trajectory",
        steps=steps,
    )


if __name__ == "__main__":
    sys.exit(preparation.main(run))
