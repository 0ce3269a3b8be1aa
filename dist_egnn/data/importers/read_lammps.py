"""LAMMPS dumps in text form (``dump … atom`` or ``custom``), read line by line: atoms may come in any order.

Positions are unwrapped (xu yu zu, or x y z with image flags ix iy iz), wrapped (x y z) or scaled (xs ys zs); other numeric
columns become attributes, vx vy vz velocities. Files may be compressed with gzip or bzip2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import IO

import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, cell_box, open_bytes, reading, split_fields

NAME, TEXT, PACKAGES = "lammps", "LAMMPS text dumps, also .gz and .bz2", ()


def detect(paths: Sequence[Path], head: bytes) -> bool:
    return head.startswith(b"ITEM: ")


def _section(line: str, where: str) -> tuple[str, list[str]]:
    """The name and the words of an ITEM line."""
    if not line.startswith("ITEM: "):
        raise Failure(f"{where}: expected 'ITEM: …', found '{line.strip()[:40]}'; is the file complete?")
    words = line.split()[1:]
    names = ("TIMESTEP", "UNITS", "TIME", "NUMBER OF ATOMS", "BOX BOUNDS", "ATOMS")
    name = next((name for name in names if line[6:].startswith(name)), words[0])
    return name, words[len(name.split()) :]


def _positions(columns: dict[str, np.ndarray], box: np.ndarray, where: str) -> tuple[np.ndarray, bool]:
    """Positions (N, 3), unwrapped ones if there are any, and whether they are; removes the columns of all positions."""
    cell = box[1:] if len(box) == 4 else np.diag(box[1] - box[0])
    taken, images = {}, [columns.pop(f"i{axis}", None) for axis in "xyz"]
    for suffix in ("u", "su", "", "s"):
        axes = [columns.pop(f"{axis}{suffix}", None) for axis in "xyz"]
        if all(axis is not None for axis in axes):
            values = np.stack(axes, 1)  # type: ignore[arg-type]
            taken[suffix] = box[0] + values @ cell if "s" in suffix else values
    if not taken:
        raise Failure(f"{where}: has no columns x y z, xu yu zu or xs ys zs")
    suffix, position = next(iter(taken.items()))
    if "u" not in suffix and all(image is not None for image in images):
        return position + np.stack(images, 1) @ cell, True  # type: ignore[arg-type]
    return position, "u" in suffix


def _box(file: IO[str], words: list[str], where: str) -> tuple[np.ndarray, tuple[bool, ...]]:
    """The box, and which axes are periodic. https://docs.lammps.org/Howto_triclinic.html"""
    rows = [[float(word) for word in file.readline().split()] for _ in range(3)]
    if any(len(row) != len(rows[0]) or len(row) not in (2, 3) for row in rows):
        raise Failure(f"{where}: BOX BOUNDS {' '.join(words)} is not supported; write low and high bounds (and tilts)")
    flags = words[-3:]
    periodic = tuple(flag == "pp" for flag in flags) if len(flags) == 3 else (False,) * 3
    low, high, *tilts = np.array(rows).T
    if not tilts:
        return np.stack([low, high]), periodic
    xy, xz, yz = tilts[0]
    low = low - [min(0, xy, xz, xy + xz), min(0, yz), 0]  # the bounds enclose the tilted box
    high = high - [max(0, xy, xz, xy + xz), max(0, yz), 0]
    return cell_box(low, np.diag(high - low) + np.array([[0, 0, 0], [xy, 0, 0], [xz, yz, 0]])), periodic


def _frame(file: IO[str], k: int, path: Path, options: ImportOptions) -> tuple[Frame, tuple[bool, ...]] | None:
    """The next frame and which axes of its box are periodic; None at the end of the file."""
    where, box, count, time = f"{path}: frame {k}", np.zeros((2, 3)), 0, None
    periodic: tuple[bool, ...] = (False,) * 3
    if not (line := file.readline()):
        return None
    while True:
        name, words = _section(line, where)
        if name in ("TIMESTEP", "UNITS", "TIME"):
            value = file.readline().strip()
            time = float(value) if name == "TIME" else time
        elif name == "NUMBER OF ATOMS":
            count = int(file.readline())
        elif name == "BOX BOUNDS":
            box, periodic = _box(file, words, where)
        elif name == "ATOMS":
            columns = _columns([file.readline().split() for _ in range(count)], words, where)
            position, unwrapped = _positions(columns, box, where)
            velocity = [columns.pop(f"v{axis}") for axis in "xyz"] if "vx" in columns else None
            frame = split_fields(columns, options, where, 3)
            frame.position, frame.box, frame.time, frame.unwrapped = position, box, time, unwrapped
            frame.velocity = None if velocity is None else np.stack(velocity, 1)
            return frame, periodic
        else:
            raise Failure(f"{where}: unknown section '{name}'")
        line = file.readline()


def _columns(rows: list[list[str]], names: list[str], where: str) -> dict[str, np.ndarray]:
    """The columns of numbers; those of text, such as the element, are left out."""
    if any(len(row) != len(names) for row in rows):
        raise Failure(f"{where}: {len(rows)} rows of {len(names)} columns expected; the file is truncated")
    result = {}
    for column, name in enumerate(names):
        try:
            result[name] = np.array([float(row[column]) for row in rows])
        except ValueError:
            continue
    return result


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory per file."""

    def read(path: Path) -> Iterator[Frame]:
        with TextIOWrapper(open_bytes(path), encoding="utf-8") as file:
            for k in range(2**62):
                with reading(f"{path}: frame {k}"):
                    if (item := _frame(file, k, path, options)) is None:
                        return
                yield item[0]

    result = []
    for path in paths:
        with reading(path), TextIOWrapper(open_bytes(path), encoding="utf-8") as file:
            item = _frame(file, 0, path, options)
        assert item is not None  # the file is not empty
        result.append(Series(path.name, lambda path=path: read(path), periodic=item[1]))  # type: ignore[misc]
    return result
