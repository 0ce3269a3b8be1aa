"""LAMMPS dumps in text form (``dump … atom`` or ``custom``), read line by line: atoms may come in any order.

Positions are x y z, unwrapped xu yu zu or scaled xs ys zs; other numeric columns become attributes, vx vy vz velocities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, reading, split_fields

NAME, TEXT, PACKAGES = "lammps", "LAMMPS text dumps", ()


def detect(paths: Sequence[Path], head: bytes) -> bool:
    return head.startswith(b"ITEM: ")


def _section(file: IO[str], where: str) -> tuple[str, list[str]]:
    """The name and the words of the next ITEM line."""
    line = file.readline()
    if not line.startswith("ITEM: "):
        raise Failure(f"{where}: expected 'ITEM: …', found '{line.strip()[:40]}'; is the file complete?")
    words = line.split()[1:]
    names = [
        name
        for name in ("TIMESTEP", "UNITS", "TIME", "NUMBER OF ATOMS", "BOX BOUNDS", "ATOMS")
        if line[6:].startswith(name)
    ]
    return (names[0], words[len(names[0].split()) :]) if names else (words[0], words[1:])


def _positions(columns: dict[str, np.ndarray], box: np.ndarray, where: str) -> np.ndarray:
    """Positions (N, 3), the unwrapped ones if there are any; removes the columns of all positions."""
    for suffix in ("u", "su", "", "s"):
        names = [f"{axis}{suffix}" for axis in "xyz"]
        if all(name in columns for name in names):
            position = np.stack([columns.pop(name) for name in names], 1)
            for other in ("x", "y", "z", "xs", "ys", "zs", "xu", "yu", "zu", "ix", "iy", "iz"):
                columns.pop(other, None)
            return box[0] + position * (box[1] - box[0]) if "s" in suffix else position
    raise Failure(f"{where}: has no columns x y z, xu yu zu or xs ys zs")


def _frame(file: IO[str], k: int, path: Path, options: ImportOptions) -> tuple[Frame, bool] | None:
    """The next frame and whether its box is periodic; None at the end of the file."""
    where, frame, box, periodic, count, time = f"{path}: frame {k}", None, np.zeros((2, 3)), False, 0, None
    start = file.tell()
    if not file.readline():
        return None
    file.seek(start)
    while frame is None:
        name, words = _section(file, where)
        if name in ("TIMESTEP", "UNITS", "TIME"):
            value = file.readline().strip()
            time = float(value) if name == "TIME" else time
        elif name == "NUMBER OF ATOMS":
            count = int(file.readline())
        elif name == "BOX BOUNDS":
            if len(words) > 3 or "xy" in words:
                raise Failure(
                    f"{where}: the box is triclinic, which is not supported; write the dump from an orthogonal one"
                )
            box = np.array([[float(word) for word in file.readline().split()[:2]] for _ in range(3)]).T
            periodic = all(word == "pp" for word in words) and len(words) == 3
            if "pp" in words and not periodic and options.periodic is None:
                raise Failure(f"{where}: periodic in some directions only, which is not supported; use --no-periodic")
        elif name == "ATOMS":
            rows = [file.readline().split() for _ in range(count)]
            if any(len(row) != len(words) for row in rows):
                raise Failure(f"{where}: {count} rows of {len(words)} columns expected; the file is truncated")
            columns: dict[str, np.ndarray] = {}
            for column, column_name in enumerate(words):
                try:
                    columns[column_name] = np.array([float(row[column]) for row in rows])
                except ValueError:
                    continue  # text, such as the element
            position = _positions(columns, box, where)
            velocity = [columns.pop(f"v{axis}") for axis in "xyz"] if "vx" in columns else None
            frame = split_fields(columns, options, where, 3)
            frame.position, frame.box, frame.time = position, box, time
            frame.velocity = None if velocity is None else np.stack(velocity, 1)
        else:
            raise Failure(f"{where}: unknown section '{name}'")
    return frame, periodic


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory per file."""

    def read(path: Path) -> Iterator[Frame]:
        with path.open(encoding="utf-8") as file:
            for k in range(2**62):
                with reading(f"{path}: frame {k}"):
                    if (item := _frame(file, k, path, options)) is None:
                        return
                yield item[0]

    result = []
    for path in paths:
        with reading(path), path.open(encoding="utf-8") as file:
            item = _frame(file, 0, path, options)
        assert item is not None  # the file is not empty
        result.append(Series(path.name, lambda path=path: read(path), periodic=item[1]))  # type: ignore[misc]
    return result
