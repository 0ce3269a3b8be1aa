"""What an importer yields: trajectories as series of frames, read one after the other."""

from __future__ import annotations

import bz2
import gzip
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Failure


@dataclass(frozen=True)
class ImportOptions:
    """The options of `distegnn import`."""

    format: str | None = None  # name of an importer; None: by content
    splits: tuple[float, float, float] = (0.8, 0.1, 0.1)  # shares of training, validation and test
    stride: int = 1  # keep frames 0, stride, 2 stride, …
    dt: float | None = None  # time between frames of the source; None: as the source says
    scale: float = 1.0  # factor of lengths
    attributes: tuple[str, ...] | None = None  # names to keep; None: all
    select: str | None = None  # atoms, in MDAnalysis's language
    ids: str | None = None  # field that identifies a particle; None: the usual names
    type: str | None = None  # field that becomes the attribute `type`
    fixed: tuple[float, ...] = ()  # types that never move
    periodic: bool | None = None  # None: as the source says
    box: tuple[float, ...] | None = None  # low and high corner (6 numbers), in place of the source's
    repeat: tuple[int, int, int] = (1, 1, 1)  # copies of a periodic box along x, y and z
    rescale: bool = False  # scale each frame to the periodic box of the first one
    center: bool = False  # move the mean of the first frame to the origin


@dataclass
class Frame:
    """One frame of N nodes in the source's units."""

    position: np.ndarray  # (N, 2) or (N, 3)
    velocity: np.ndarray | None = None  # of the shape of position, length per time
    attributes: dict[str, np.ndarray] = field(default_factory=dict)  # name → (N,) or (N, k)
    ids: np.ndarray | None = None  # (N,), identify the nodes
    time: float | None = None
    box: np.ndarray | None = None  # (2, 3) low and high corner, or (4, 3) corner and three cell vectors
    reordered: bool = False  # whether the rows were in another order in the source
    unwrapped: bool = False  # whether the source has unwrapped the positions itself
    edges: Callable[[], np.ndarray] | None = (
        None  # makes the edges (E, 2) between rows, such as bonds or edges of cells
    )
    turn: float = 0.0  # largest move of a node up to here, in sides of the periodic box
    notes: list[str] = field(default_factory=list)  # what was done to the periodic box up to here
    crossings: int = 0  # boundaries of the periodic box between the source's positions and the unwrapped ones


@dataclass
class Series:
    """One trajectory of a source."""

    name: str
    frames: Callable[[], Iterator[Frame]]  # reads the frames from the first one again
    count: int | None = None  # frames, if known
    split: str | None = None  # if the source has splits of its own
    dt: float | None = None  # time between frames, if the source has one for all
    periodic: bool | tuple[bool, ...] = False  # in all directions, or by axis
    flat: bool = False  # two-dimensional, by its first frame: z is not periodic
    notes: list[str] = field(default_factory=list)  # what looks wrong in the file


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Turn the many exceptions of the formats' libraries into one Failure that names the file or frame."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries warn before they raise, and about fields that are not used
            yield
    except (Failure, MemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, ImportError):
            raise Failure(f"{where}: cannot be read ({reason})") from error
        reason = f"{type(error).__name__} {reason}" if isinstance(error, LookupError) else reason
        remedy = "is the file complete? --format names another reader"
        raise Failure(f"{where}: cannot be read ({reason}); {remedy}") from error


def suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compressed file."""
    return (path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2") else path).suffix.lower()


def open_bytes(path: Path) -> Any:
    """The content of a file, decompressed if it is a gzip or bzip2 file."""
    with path.open("rb") as file:
        magic = file.read(3)
    opener = gzip.open if magic[:2] == b"\x1f\x8b" else bz2.open if magic == b"BZh" else open
    return opener(path, "rb")


def cell_box(corner: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """The box of a corner (3,) and three cell vectors (3, 3): (2, 3) if it is orthorhombic along the axes, else (4, 3)."""
    sides = np.diag(cell)
    orthorhombic = np.abs(cell - np.diag(sides)).max() <= 1e-6 * np.abs(cell).max() and sides.min() > 0
    return np.stack([corner, corner + sides]) if orthorhombic else np.concatenate([corner[None], cell])


def natural_order(path: Path) -> list[str | int]:
    """Sort key with which step_10 comes after step_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def take(values: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray | None:
    """Remove and return the first of these fields, compared without case; None if there is none."""
    lower = {name.lower(): name for name in values}
    return next((values.pop(lower[name]) for name in names if name in lower), None)


IDS = ("id", "ids", "particle_id", "particleid", "pointid", "globalpointids", "idp", "particle id")
VELOCITIES = ("velocity", "velocities", "vel", "v", "u")
TYPES = ("particle_type", "particle_types", "particletype", "type", "types", "mk", "material")


def split_fields(fields: dict[str, np.ndarray], options: ImportOptions, where: str, dim: int) -> Frame:
    """A Frame without positions: ids, velocity and attributes chosen from named fields (N,) or (N, k) by their names.

    Raises Failure for a field that the options name and that is missing.
    """
    named = {"--ids": options.ids, "--type": options.type}
    for option, name in named.items():
        if name is not None and name not in fields:
            raise Failure(f"{option} {name}: {where} has no such field (it has: {', '.join(fields) or 'none'})")
    rest = dict(fields)
    ids = rest.pop(options.ids) if options.ids else take(rest, IDS)
    kind = rest.pop(options.type) if options.type else take(rest, TYPES)
    velocity = None
    for name in [name for name in rest if name.lower() in VELOCITIES and rest[name].ndim == 2]:
        if velocity is None and rest[name].shape[1] >= dim:
            velocity = rest.pop(name)[:, :dim]
    attributes = rest if kind is None else {"type": kind} | rest
    return Frame(np.empty((0, dim)), velocity, attributes, ids)
