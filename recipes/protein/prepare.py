"""Convert molecular dynamics that MDAnalysis reads, split by frame into training, validation and test trajectories.

Three sources: the AdK trajectory of the package MDAnalysisTests (98 frames, no network), the AdK equilibrium trajectory of
the benchmark (4,187 frames, 161 MB, fetched by MDAnalysisData), and other files.

A split is a range of *input* frames [lo, hi). Its trajectory also holds the ``--horizon`` frames after them, which are
targets. With data.horizon equal to it, a split has exactly hi − lo samples, as in the benchmark, and the targets of its last
inputs are the first frames of the next split.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_egnn.data import graphs
from dist_egnn.data import prepare as preparation
from dist_egnn.data.trajectories import SPLITS, unwrap
from dist_egnn.errors import Failure
from dist_egnn.utils import filesystem
from dist_egnn.utils.filesystem import check_free_space

if TYPE_CHECKING:
    from MDAnalysis import AtomGroup
    from MDAnalysis.coordinates.timestep import Timestep

Spans = tuple[tuple[int, int], ...]  # input frames [lo, hi) of each split
PUBLISHED: Spans = ((0, 2481), (2481, 3308), (3308, 4171))
TINY = 40  # frames
RADIUS = 10.0  # Å, of config.yaml
BOX_CHANGE = 1e-3
SCALES = {
    "tiny": "AdK dims, first 40 frames: 25 samples, 3 s, 0.6 MB",
    "small": "AdK dims, all 98 frames: 83 samples, 3 s, 1.1 MB",
    "full": "AdK equilibrium: 4,171 samples; 161 MB to fetch once, then 6 s, 35 MB (measured on synthetic data of this size)",
}
EXAMPLE = "python recipes/protein/prepare.py --out data/adk.h5"


class Source(NamedTuple):
    """The files of a trajectory. boxed: whether its box is valid (not after superposition)."""

    topology: Path
    trajectory: tuple[Path, ...]
    boxed: bool

    def __str__(self) -> str:
        return ", ".join(str(path) for path in (self.topology, *self.trajectory))


def first_line(error: Exception) -> str:
    """The first line of a library's error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def adk_dims() -> Source:
    """The trajectory of MDAnalysisTests: the dims transition of AdK, implicit solvent, no box."""
    from MDAnalysisTests.datafiles import DCD, PSF

    return Source(Path(PSF), (Path(DCD),), False)


def adk_equilibrium() -> Source:
    """The trajectory of the benchmark, fetched if missing. It is superimposed frame by frame, so its box is not valid."""
    from MDAnalysisData import adk_equilibrium as adk
    from MDAnalysisData.base import get_data_home

    folder = Path(get_data_home()) / adk.NAME
    for remote in adk.ARCHIVE.values():  # the library accepts any existing file, even an incomplete download
        file = folder / remote.filename
        if file.exists() and filesystem.sha256(file) != remote.checksum:
            print(f"{file}: incomplete; fetching it again", file=sys.stderr)
            file.unlink()
    socket.setdefaulttimeout(60)
    try:
        files = adk.fetch_adk_equilibrium()
    except (OSError, HTTPException) as error:
        names = " and ".join(remote.filename for remote in adk.ARCHIVE.values())
        raise Failure(
            f"AdK equilibrium cannot be fetched into {folder} ({first_line(error)}); run the same command with a network, "
            f"put {names} there, or use --source adk-dims"
        ) from error
    return Source(Path(files.topology), (Path(files.trajectory),), False)


SOURCES = {"adk-dims": adk_dims, "adk-equilibrium": adk_equilibrium}


def select(source: Source, selection: str) -> AtomGroup:
    """Open a trajectory and select the atoms that become nodes."""
    from MDAnalysis import Universe

    # about unused topology attributes; set after the import, which sets its own filters
    warnings.filterwarnings("ignore", module="MDAnalysis")
    try:
        universe = Universe(*(str(path) for path in (source.topology, *source.trajectory)))
        frames = universe.trajectory.n_frames
    except Exception as error:  # the readers of MDAnalysis raise various types
        raise Failure(f"{source}: MDAnalysis cannot read this as one system: {first_line(error)}") from error
    if not frames:
        raise Failure(f"{source}: holds no frame")
    try:
        atoms = universe.select_atoms(selection)
    except Exception as error:  # also various types
        raise Failure(f"--select {selection!r}: cannot be applied to {source.topology}: {first_line(error)}") from error
    if not len(atoms):
        raise Failure(f"--select {selection!r}: no atom of {source.topology}; --select all takes every atom")
    return atoms


def charges(atoms: AtomGroup, topology: Path) -> np.ndarray:
    """The charge of each atom (N,) in elementary charges; zeros, with a message, if the topology has none."""
    if hasattr(atoms, "charges"):
        return atoms.charges
    print(f"{topology}: no charges in this topology; the attribute 'charge' is 0 for every atom")
    return np.zeros(len(atoms))


def sides(frame: Timestep, where: str) -> np.ndarray | None:
    """The sides (3,) of a frame's box, None without one. Raises Failure for one that is not orthorhombic."""
    box = frame.dimensions
    if box is None:
        return None
    if np.abs(box[3:] - 90).max() > 1e-3:
        angles = ", ".join(f"{angle:g}" for angle in box[3:])
        raise Failure(
            f"{where}: its box has angles {angles}, but only orthorhombic boxes are supported; omit it with --no-box"
        )
    return box[:3].astype(np.float64)


def positions(atoms: AtomGroup, source: Source, lo: int, hi: int, side: np.ndarray | None) -> np.ndarray:
    """Frames lo … hi − 1 as (hi − lo, N, 3) float32 in Å; in a box, unwrapped, so that atoms do not jump at its boundary.

    Raises Failure for a frame that cannot be read, and for a box that differs from ``side`` (3,).
    """
    result = np.empty((hi - lo, len(atoms), 3), np.float32)
    frames = atoms.universe.trajectory
    for k in range(hi - lo):
        where = f"{source}: frame {lo + k}"
        try:
            frame = frames[lo + k]
            result[k] = atoms.positions
        except Exception as error:  # the readers of MDAnalysis raise various types
            raise Failure(
                f"{where} cannot be read ({first_line(error)}); "
                f"every frame needs {len(atoms.universe.atoms)} atoms as the first"
            ) from error
        if not np.isfinite(result[k]).all():
            raise Failure(f"{where}: a position is NaN or infinite; correct the trajectory")
        current = sides(frame, where) if source.boxed else None
        if side is not None and (current is None or (np.abs(current - side) > BOX_CHANGE * side).any()):
            sizes = [" x ".join(f"{s:g}" for s in box) if box is not None else "none" for box in (side, current)]
            raise Failure(
                f"{where}: its box is {sizes[1]}, that of frame 0 is {sizes[0]}; it may change by at most 0.1%; "
                "omit it with --no-box"
            )
    if side is not None:
        unwrap(result, side)
    return result


def ranges(frames: int, horizon: int, weights: Sequence[float], where: str) -> Spans:
    """The input frames [lo, hi) of each split: consecutive, in proportion to ``weights``."""
    ends = np.rint(np.cumsum([0.0, *weights]) / sum(weights) * max(frames - horizon, 0)).astype(int).tolist()
    spans = tuple(itertools.pairwise(ends))
    if any(lo == hi for lo, hi in spans):
        raise Failure(
            f"{where}: {frames} frames leave a split without inputs if targets are {horizon} frames ahead; "
            "lower --horizon or change --splits"
        )
    return spans


def trajectory(
    options: argparse.Namespace, source: Source, spans: Spans, side: np.ndarray | None, charge: np.ndarray, k: int
) -> Iterator[dict[str, Any]]:
    """Yield the trajectory of split k as arguments of ``Writer.add``."""
    atoms = select(source, options.select)
    lo, hi = spans[k]
    files = ", ".join(path.name for path in source.trajectory or (source.topology,))
    yield {
        "position": positions(atoms, source, lo, hi + options.horizon, side),
        "split": SPLITS[k],
        "dt": atoms.universe.trajectory.dt,
        "source": f"{files}, frames {lo}…{hi + options.horizon - 1}",
        "attributes": {"charge": charge},
        "box": None if side is None else np.stack([np.zeros(3), side]),
        "periodic": side is not None,
    }


def print_crossing_pairs(x: np.ndarray, side: np.ndarray) -> None:
    """Print how many pairs of the first frame depend on data.periodic."""
    radius = min(RADIUS, 0.49 * side.min())
    periodic = len(graphs.radius_edges(x, radius, side)[0])
    across = periodic - len(graphs.radius_edges(x, radius)[0])
    print(
        f"periodic box of {' x '.join(f'{s:g}' for s in side)} Å: {across:,} of {periodic:,} pairs within {radius:g} Å in frame 0 "
        "are neighbours across its boundary; they are edges only with data.periodic=true"
    )


def parser() -> preparation.Parser:
    result = preparation.parser((__doc__ or "").splitlines()[0], SCALES, EXAMPLE)
    option = result.add_argument
    option("--source", choices=SOURCES, help="default: adk-dims, at full scale adk-equilibrium")
    option("--topology", type=Path, help="instead of --source: a PSF, PDB, GRO, … file")
    option(
        "--trajectory", type=Path, nargs="+", default=[], help="its DCD, XTC, TRR, …; default: the topology's frames"
    )
    option("--select", default="backbone", help="atoms to use, in MDAnalysis's selection language (default backbone)")
    option(
        "--splits", type=float, nargs=3, metavar=("TRAIN", "VALID", "TEST"), help="proportions (default: as published)"
    )
    option("--horizon", type=int, default=15, help="data.horizon of the splits (default 15)")
    option(
        "--no-box",
        action="store_true",
        help="omit the box, which data.periodic needs; molecules must then be whole",
    )
    result.epilog = (result.epilog or "").replace(
        "\n\nexample",
        "\nWith --topology: tiny uses the first 40 frames, small and full use all; a split is held in memory,\n"
        "12 bytes per atom and frame. --seed has no effect.\n\nexample",
    )
    return result


def open_source(options: argparse.Namespace) -> tuple[str, Source]:
    """The name and the files of the source that the options select."""
    for package in ("MDAnalysis", "MDAnalysisData", "MDAnalysisTests"):
        if importlib.util.find_spec(package) is None:
            raise Failure(f"{package} is not installed; run make setup, or pip install -e '.[protein]'")
    if options.topology is None:
        if options.trajectory:
            raise Failure("--trajectory: also needs --topology, the file with its atoms")
        name = options.source or ("adk-equilibrium" if options.scale == "full" else "adk-dims")
        return name, SOURCES[name]()
    if options.source:
        raise Failure("--source and --topology: give only one of them")
    for path in (options.topology, *options.trajectory):
        if not path.is_file():
            raise Failure(f"{path}: no such file")
    return options.topology.name, Source(options.topology, tuple(options.trajectory), not options.no_box)


def run(arguments: Sequence[str] | None = None) -> None:
    """Read the first frame, determine the splits, write one trajectory for each."""
    options = preparation.parse(parser(), arguments)
    if options.horizon < 1:
        raise Failure(f"--horizon {options.horizon}: must be at least 1")
    if options.splits and not min(options.splits) > 0:
        raise Failure(f"--splits {' '.join(f'{s:g}' for s in options.splits)}: three numbers above 0")
    name, source = open_source(options)
    atoms = select(source, options.select)
    frames = atoms.universe.trajectory.n_frames
    if options.scale == "tiny":
        frames = min(frames, TINY)
    if name == "adk-equilibrium" and options.scale != "tiny" and not options.splits:
        spans = PUBLISHED
        if frames < PUBLISHED[-1][1] + options.horizon:
            raise Failure(
                f"{source}: {frames} frames, too few for the published splits; lower --horizon or set --splits"
            )
    else:
        weights = options.splits or [hi - lo for lo, hi in PUBLISHED]
        spans = ranges(frames, options.horizon, weights, str(source))
    side = sides(atoms.universe.trajectory[0], f"{source}: frame 0") if source.boxed else None
    charge = charges(atoms, source.topology)
    if side is not None:
        print_crossing_pairs(atoms.positions, side)
    counts = ", ".join(f"{split} {hi - lo:,}" for split, (lo, hi) in zip(SPLITS, spans, strict=True))
    print(f"{name}: {frames:,} frames, {len(atoms):,} of {len(atoms.universe.atoms):,} atoms; inputs: {counts}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # the parts of the splits and the joined file
    check_free_space(options.out, 2 * 12 * len(atoms) * sum(hi - lo + options.horizon for lo, hi in spans))
    settings = {
        "description": f"{name}: {len(atoms)} atoms ({options.select}), lengths in Å, dt in ps, charge in e",
        "files": [[path.name, filesystem.sha256(path)] for path in (source.topology, *source.trajectory)],
        "select": options.select,
        "splits": dict(zip(SPLITS, spans, strict=True)),
        "horizon": options.horizon,
        "box": side is not None,
        "versions": preparation.versions("MDAnalysis", "numpy", "h5py"),
    }
    make = functools.partial(trajectory, options, source, spans, side, charge)
    preparation.write(
        options.out, make, len(SPLITS), settings=settings, workers=options.workers, threads=True, unit="split"
    )


if __name__ == "__main__":
    sys.exit(preparation.main(run))
