"""`distegnn import`: check the trajectories of other programs, print what was found, write trajectories.h5."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import prepare
from ..data.importers import open_series
from ..data.importers.convert import Summary, frames_between, measure
from ..data.importers.series import ImportOptions, Series
from ..data.importers.splits import assign_splits
from ..errors import Failure
from ..utils import filesystem
from ..utils.console import print_line, print_table
from ..utils.progress import progress_bar


def _numbers(option: str, text: str, counts: Sequence[int] = ()) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise Failure(f"{option} {text}: write numbers separated by commas") from error
    if (counts and len(values) not in counts) or not all(map(math.isfinite, values)):
        raise Failure(f"{option} {text}: write {' or '.join(map(str, counts)) or 'finite'} numbers separated by commas")
    return values


def parse_options(texts: Mapping[str, str | None], **given: Any) -> ImportOptions:
    """The options of the command line. texts: those that are lists. Raises Failure that names the option."""
    shares = _numbers("--split", texts["split"] or "", (3,))
    if min(shares) < 0 or shares[0] <= 0:
        raise Failure(f"--split {texts['split']}: three shares from 0, the first above 0")
    for option, value in (("--dt", given["dt"]), ("--scale", given["scale"])):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise Failure(f"{option} {value}: must be above 0")
    box = _numbers("--box", texts["box"], (6,)) if texts["box"] else None
    if box and not all(low < high for low, high in zip(box[:3], box[3:], strict=True)):
        raise Failure(f"--box {texts['box']}: the low corner must be below the high one")
    copies = _numbers("--repeat", texts["repeat"] or "1,1,1", (3,))
    if not all(copy >= 1 and copy == int(copy) for copy in copies):
        raise Failure(f"--repeat {texts['repeat']}: three whole numbers from 1")
    given["repeat"] = tuple(map(int, copies))
    names = tuple(texts["attributes"].split(",")) if texts["attributes"] else None
    fixed = _numbers("--fixed", texts["fixed"]) if texts["fixed"] else ()
    return ImportOptions(splits=shares[:3], attributes=names, fixed=fixed, box=box, **given)  # type: ignore[arg-type]


def _digest(paths: Sequence[Path]) -> str:
    """A hash of the content of all files, those of folders included."""
    files = [file for path in paths for file in (sorted(path.rglob("*.*")) if path.is_dir() else [path])]
    digest = hashlib.sha256()
    for file in files:
        digest.update(filesystem.sha256(file).encode())
    return digest.hexdigest()


def table_rows(names: Sequence[str], summaries: Sequence[Summary]) -> list[list[Any]]:
    """The rows below HEADER, one for each trajectory."""
    rows = []
    for name, summary in zip(names, summaries, strict=True):
        size = " x ".join(f"{side:.4g}" for side in summary.high - summary.low)
        box = "-" if summary.box is None else " x ".join(f"{side:.4g}" for side in np.diff(summary.box, axis=0)[0])
        named = "" if all(summary.axes) else f" {''.join(itertools.compress('xyz', summary.axes))}"
        box += f" periodic{named}" * summary.periodic
        fields = [f"{k} ({w})" * (w > 1) or k for k, w in summary.widths.items()]
        known = ", ".join(["velocity"] * summary.velocity + [n + "(t)" * (n in summary.varying) for n in fields]) or "-"
        rows.append([name, f"{summary.frames:,}", f"{summary.nodes:,}", summary.dim, f"{summary.dt:.4g}", size, box])
        rows[-1] += [
            f"{summary.spacing:.3g}",
            f"{summary.largest_move:.3g}",
            summary.reordered,
            summary.unwrapped,
            f"{summary.edges:,}",
            known,
        ]
    return rows


HEADER = [
    "trajectory",
    "frames",
    "nodes",
    "dim",
    "dt",
    "extent",
    "box",
    "spacing",
    "max move",
    "reordered",
    "crossings",
    "edges",
    "fields",
]


def _make(
    series: Sequence[Series],
    summaries: Sequence[Summary],
    jobs: Sequence[tuple[int, str, int, int]],
    options: ImportOptions,
    written: Counter[int],
    number: int,
) -> Iterator[dict[str, Any]]:
    """The trajectory of a job as arguments of ``Writer.begin`` and its frames. written: frames of each job, counted."""
    k, split, lo, hi = jobs[number]
    one, summary = series[k], summaries[k]
    frames = frames_between(one, summary, options, lo, hi)
    first = next(frames)
    constant = {name: value for name, value in first.attributes.items() if name not in summary.varying}

    def arguments() -> Iterator[dict[str, Any]]:
        for frame in itertools.chain([first], frames):
            written[number] += 1
            yield _frame_arguments(frame, summary)

    source = f"{one.name}, frames {lo * options.stride} to {(hi - 1) * options.stride}"
    shift = summary.shift.tolist() if summary.shift.any() else None
    yield {
        **{
            "shift": shift,
            "split": split,
            "dt": summary.dt,
            "source": source,
            "attributes": constant,
            "box": first.box,
        },
        **{"periodic": summary.axes, "frames": arguments()},
        "edges": first.edges() if summary.edges and first.edges else None,
    }


def _frame_arguments(frame: Any, summary: Summary) -> dict[str, Any]:
    varying = {name: frame.attributes[name] for name in sorted(summary.varying)}
    return {"position": frame.position, "velocity": frame.velocity, "attributes": varying}


def run_import(paths: Sequence[Path], out: Path, options: ImportOptions) -> None:
    """Check every series, print the table, write OUT. Raises Failure, naming file, frame and field."""
    name, series = open_series(paths, options)
    summaries = []
    counts = [-(-one.count // options.stride) for one in series if one.count is not None]
    by_frame = len(counts) == len(series)  # else the frames are not known before they are read
    with progress_bar("checking", sum(counts) if by_frame else len(series)) as tick:
        for one in series:
            summaries.append(measure(one, options, *([tick] if by_frame else [])))
            if not by_frame:
                tick(one.name)
    jobs = assign_splits(series, summaries, options)
    rows = table_rows([one.name for one in series], summaries)
    print_table(f"{name}: {len(series)} trajectories" if len(series) > 1 else name, HEADER, rows)
    notes = [f"{one.name}: {note}" for one, summary in zip(series, summaries, strict=True) for note in summary.notes]
    for note in notes:
        print_line(f"warning: {note}")
    frames = {split: sum(hi - lo for _, s, lo, hi in jobs if s == split) for split in ("train", "valid", "test")}
    print_line("frames: " + ", ".join(f"{split} {count:,}" for split, count in frames.items()))
    settings = {
        **{"format": name, "files": [path.name for path in paths], "sha256": _digest(paths), "warnings": notes},
        "options": {key: value for key, value in vars(options).items() if value not in (None, ())},
        "dim": max(summary.dim for summary in summaries),
    }
    written = Counter[int]()
    make = functools.partial(_make, series, summaries, jobs, options, written)
    steps = prepare.Steps("frames", [hi - lo for *_, lo, hi in jobs], written.__getitem__)
    prepare.write(out, make, len(jobs), settings=settings, workers=1, threads=True, unit="trajectory", steps=steps)
