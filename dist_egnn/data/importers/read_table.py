"""Tables: .csv and .parquet with columns for the frame, the particle, x y z and anything else, sorted by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ...errors import Failure
from .series import Frame, ImportOptions, Series, reading, split_fields, suffix

NAME, TEXT, PACKAGES = "table", ".csv, .parquet", ()
ROWS = 1 << 18  # rows read at once
FRAMES, TIMES = ("frame", "step", "timestep", "frame_id"), ("time", "t")


def detect(paths: Sequence[Path], head: bytes) -> bool:
    return suffix(paths[0]) in (".csv", ".tsv", ".parquet")


def _chunks(path: Path) -> Iterator[pd.DataFrame]:
    if suffix(path) != ".parquet":
        yield from pd.read_csv(path, sep="\t" if suffix(path) == ".tsv" else ",", chunksize=ROWS, skipinitialspace=True)
        return
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise Failure(f"{path}: needs pyarrow, which is not installed; pip install 'dist_egnn[import]'") from error
    for batch in parquet.ParquetFile(path).iter_batches(ROWS):
        yield batch.to_pandas()


def _column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    return next((column for column in table if str(column).strip().lower() in names), None)


def _frames(path: Path) -> Iterator[tuple[float | None, float | None, pd.DataFrame]]:
    """Frame or time, time, and the rows of each frame. Raises Failure if the rows are not sorted by frame."""
    rest, last = None, -np.inf
    for chunk in _chunks(path):
        table = chunk if rest is None else pd.concat([rest, chunk], ignore_index=True)
        key = _column(table, FRAMES) or _column(table, TIMES)
        if key is None:
            raise Failure(
                f"{path}: has no column for the frame ({', '.join((*FRAMES, *TIMES))}); it has: {', '.join(table)}"
            )
        values = table[key].to_numpy(float)
        if not np.all(np.diff(values) >= 0) or values[0] < last:
            raise Failure(
                f"{path}: rows are not sorted by '{key}'; sort them, for example with pandas.DataFrame.sort_values"
            )
        ends = [*(np.flatnonzero(np.diff(values)) + 1)]
        for lo, hi in zip([0, *ends], ends, strict=False):
            yield _split_row(table.iloc[lo:hi], key)
        rest, last = table.iloc[ends[-1] if ends else 0 :], values[-1]
    if rest is not None and len(rest):
        yield _split_row(rest, _column(rest, FRAMES) or _column(rest, TIMES) or "")


def _split_row(table: pd.DataFrame, key: str) -> tuple[float | None, float | None, pd.DataFrame]:
    time = _column(table, TIMES)
    drop = [name for name in {key, time} if name]
    return float(table[key].iloc[0]), None if time is None else float(table[time].iloc[0]), table.drop(columns=drop)


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory per file."""

    def read(path: Path) -> Iterator[Frame]:
        with reading(path):
            for number, time, table in _frames(path):
                where = f"{path}: frame {number:g}"
                lower = {str(name).strip().lower(): name for name in table}
                axes = [axis for axis in "xyz" if axis in lower]
                if axes[:2] != ["x", "y"]:
                    raise Failure(f"{where}: has no columns x, y and z; it has: {', '.join(map(str, table))}")
                position = table[[lower[axis] for axis in axes]].to_numpy(float)
                speeds = [lower[f"v{axis}"] for axis in axes if f"v{axis}" in lower]
                used = {*(lower[axis] for axis in axes), *(speeds if len(speeds) == len(axes) else ())}
                fields = {str(c): table[c].to_numpy() for c in table if c not in used and table[c].dtype.kind in "biuf"}
                frame = split_fields(fields, options, where, len(axes))
                frame.position, frame.time = position, time
                if len(speeds) == len(axes):
                    frame.velocity = table[speeds].to_numpy(float)
                yield frame

    return [Series(path.name, lambda path=path: read(path)) for path in paths]  # type: ignore[misc]
