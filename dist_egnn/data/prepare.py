"""What the prepare.py of every recipe shares: options, workers, safe to kill and resume, a manifest beside the file.

A source is cut into *pieces* of one or more trajectories. Each is written, whole or not at all, to OUT.parts/; when all are
there they are joined into OUT, byte for byte the same however often the work was interrupted and by how many workers it was done.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..distributed.spawn import watch
from ..errors import Failure
from ..utils import disk, filesystem, progress
from .trajectories import Writer, join

SCALES = ("tiny", "small", "full")
POLL_S = 0.5


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise Failure(f"{message}; see --help")


def parser(description: str, scales: Mapping[str, str], example: str) -> Parser:
    """The options that every source has. scales: what tiny, small and full are, how long they take and how large they get."""
    lines = "\n".join(f"  {name:6} {text}" for name, text in scales.items())
    found = Parser(
        description=description,
        epilog=f"scales:\n{lines}\n\nexample:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = found.add_argument
    option("--out", type=Path, required=True, help="the trajectories.h5 to write")
    option("--scale", choices=SCALES, default="small", help="how much of it (default small; full: as published)")
    option("--seed", type=int, default=0, help="decides every random number (default 0)")
    option("--workers", type=int, default=len(os.sched_getaffinity(0)), help="pieces at a time (default: the cores)")
    option("--debug", action="store_true", help="show a traceback when something fails")
    return found


def parse(from_parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; Failure for what cannot be."""
    options = from_parser.parse_args(arguments)
    for name, low in (("seed", 0), ("workers", 1)):
        if getattr(options, name) < low:
            raise Failure(f"--{name} {getattr(options, name)}: must be at least {low}")
    return options


def main(run: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """run(arguments); a failure is one line and exit code 2 (a traceback with --debug), Ctrl-C 130."""
    try:
        run(arguments)
    except (Failure, OSError) as error:
        if "--debug" in (sys.argv[1:] if arguments is None else arguments):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of the packages that made the data."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _piece(make: Callable[[int], Iterable[dict[str, Any]]], folder: Path, number: int) -> int:
    with Writer(folder / f"{number:06d}.h5", {}) as out:
        for trajectory in make(number):
            out.add(**trajectory)
    return number


@dataclass(frozen=True)
class Steps:
    """How to count progress within pieces: each has ``size`` steps; reached(k): how many piece k has made, while in work."""

    unit: str
    size: int
    reached: Callable[[int], int]


def write(
    out: Path,
    make: Callable[[int], Iterable[dict[str, Any]]],
    pieces: int,
    *,
    settings: Mapping[str, Any],
    workers: int,
    threads: bool = False,
    unit: str = "piece",
    steps: Steps | None = None,
) -> None:
    """Write OUT and OUT.manifest.json: make(k) yields piece k's trajectories, as arguments of ``Writer.add``.

    settings: all that decides the data (seed, scale, versions, …): stored in OUT, and pieces made with others are not taken.
    make runs in ``workers`` processes, so it must be picklable and may depend on k alone; or in threads. steps: for pieces
    that take long. Raises Failure where something cannot be written; complete pieces stay.
    """
    if out.is_dir():
        raise Failure(f"{out} is a folder; --out must name a file")
    started = time.monotonic()
    try:
        folder = _begin(out, settings)
        names = [folder / f"{k:06d}.h5" for k in range(pieces)]
        _make(out, functools.partial(_piece, make, folder), names, workers, threads, unit, steps)
        with progress.bar(f"{out.name} (joining)", pieces) as tick:
            join(names, out, settings, tick)
        manifest = {
            "command": shlex.join(["python", *sys.argv]),
            "seconds": round(time.monotonic() - started, 1),
            "settings": dict(settings),
            "sha256": sha256(out),
            "bytes": out.stat().st_size,
        }
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        filesystem.write_whole(out.with_name(out.name + ".manifest.json"), text.encode())
    except OSError as error:
        raise Failure(f"{disk.reason(error, out)}; once that is mended the same command goes on") from error
    shutil.rmtree(folder)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s")


def _begin(out: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the pieces, new, or left there by the same settings."""
    folder = out.with_name(out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    marked, wanted = folder / "settings.json", json.dumps(settings, sort_keys=True, indent=1)
    if not marked.exists():
        filesystem.write_whole(marked, wanted.encode())
    elif marked.read_text() != wanted:
        raise Failure(
            f"{folder} has pieces made with other settings ({marked}); delete that folder, or choose another --out"
        )
    return folder


def _make(
    out: Path,
    piece: Callable[[int], int],
    names: Sequence[Path],
    workers: int,
    threads: bool,
    unit: str,
    steps: Steps | None,
) -> None:
    """Make the pieces that are missing, and show how far they are."""
    pool: Executor
    if threads:
        pool = ThreadPoolExecutor(workers)
    else:
        context = multiprocessing.get_context("forkserver")
        pool = ProcessPoolExecutor(workers, context, initializer=watch, initargs=(os.getpid(),))
    missing = [k for k, name in enumerate(names) if not name.exists()]
    size, title = (steps.size, f"{out.name} ({steps.unit})") if steps else (1, out.name)
    whole, most, note = len(names) - len(missing), 0, ""
    with progress.bar(title, len(names) * size, done=whole * size) as tick:
        try:
            futures = {pool.submit(piece, k): k for k in missing}
            while futures:
                ended = wait(futures, POLL_S if steps else None, FIRST_COMPLETED).done
                for future in ended:
                    del futures[future]
                    note, whole = f"{unit} {future.result()}", whole + 1
                part = sum(steps.reached(k) for future, k in futures.items() if future.running()) if steps else 0
                most = max(most, whole * size + part)  # a piece's own count ends a little before the piece does
                tick(note, to=most)
        finally:
            pool.shutdown(cancel_futures=True)


def steps_in(path: Path) -> int:
    """The number that a process keeps in a file of how far it has come; 0 as long as there is none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0
