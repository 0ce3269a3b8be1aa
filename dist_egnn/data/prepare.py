"""Shared by every recipe's prepare.py: options, parallel and resumable writing, and a manifest beside the file.

A source is divided into numbered *parts* of one or more trajectories. Each is written completely or not at all to
OUT.parts/; then all are joined into OUT. Its bytes depend neither on interruptions nor on the number of workers.
"""

from __future__ import annotations

import argparse
import functools
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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..distributed import spawn
from ..errors import Failure
from ..utils import console, filesystem, progress
from . import checks
from .trajectories import Trajectories, Writer

SCALES = ("tiny", "small", "full")
POLL_S = 0.5


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise Failure(f"{message}; see --help")


def parser(description: str, scales: Mapping[str, str], example: str) -> Parser:
    """The options that every source has. scales: the content, duration and size of tiny, small and full."""
    lines = "\n".join(f"  {name:6} {text}" for name, text in scales.items())
    result = Parser(
        description=description,
        epilog=f"scales:\n{lines}\n\nexample:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = result.add_argument
    option("--out", type=Path, required=True, help="the trajectories.h5 to write")
    option("--scale", choices=SCALES, default="small", help="amount of data (default small; full: as published)")
    option("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    option("--workers", type=int, default=len(os.sched_getaffinity(0)), help="parts made in parallel (default: cores)")
    option("--debug", action="store_true", help="print a traceback after an error")
    return result


def parse(from_parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and validate the common options. Raises Failure for invalid values."""
    options = from_parser.parse_args(arguments)
    for name, low in (("seed", 0), ("workers", 1)):
        if getattr(options, name) < low:
            raise Failure(f"--{name} {getattr(options, name)}: must be at least {low}")
    return options


def main(run: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """Call run(arguments) and return the exit code, 2 after an error (--debug: with traceback), 130 after Ctrl-C."""
    console.guard_streams()
    try:
        run(arguments)
    except (Failure, OSError) as error:
        if "--debug" in (sys.argv[1:] if arguments is None else arguments):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of these packages."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _write_part(make: Callable[[int], Iterable[dict[str, Any]]], folder: Path, number: int) -> int:
    with Writer(folder / f"{number:06d}.h5", {}) as out:
        for trajectory in make(number):
            if (frames := trajectory.pop("frames", None)) is None:
                out.add(**trajectory)
                continue
            with out.begin(**trajectory) as writer:
                for frame in frames:
                    writer.add_frame(**frame)
    return number


@dataclass(frozen=True)
class Steps:
    """Progress within parts: part k has sizes[k] steps, of which reached(k) are done while it is made."""

    unit: str
    sizes: Sequence[int]
    reached: Callable[[int], int]


def write(
    out: Path,
    make: Callable[[int], Iterable[dict[str, Any]]],
    parts: int,
    *,
    settings: Mapping[str, Any],
    workers: int,
    threads: bool = False,
    unit: str = "part",
    steps: Steps | None = None,
) -> None:
    """Write OUT and OUT.manifest.json; make(k) yields the trajectories of part k as arguments of ``Writer.add``.

    With a key "frames" they are arguments of ``Writer.begin``, and "frames" iterates over those of ``add_frame``.

    settings: all that determines the data, stored in OUT; parts made with others are refused. workers: processes or
    threads that call make. Raises Failure if something cannot be written, and for content that readers refuse; complete
    parts remain.
    """
    if out.is_dir():
        raise Failure(f"{out} is a folder; --out must name a file")
    folder = out.with_name(out.name + ".parts")  # new, or left by an interrupted run
    with filesystem.lock_folder(folder, "another process is making it; wait for it, or choose another --out"):
        started = time.monotonic()
        pool: Executor = ThreadPoolExecutor(workers)
        if not threads:
            context, server = multiprocessing.get_context("forkserver"), spawn.start_forkserver()
            pool = ProcessPoolExecutor(workers, context, spawn.exit_with_parent, (os.getpid(), server))
        try:
            file, content = folder / "settings.json", json.dumps(settings, sort_keys=True, indent=1)
            if not file.exists():
                filesystem.write_atomically(file, content.encode())
            elif file.read_text(encoding="utf-8") != content:
                raise Failure(
                    f"{folder} has parts made with other settings ({file}); delete it, or choose another --out"
                )
            paths = [folder / f"{k:06d}.h5" for k in range(parts)]
            _make_missing(out.name, functools.partial(_write_part, make, folder), paths, pool, unit, steps)
            for path in paths:
                with closing(Trajectories(path)) as part:
                    checks.check_content(part)  # what readers refuse must not replace OUT
            filesystem.check_free_space(out, sum(path.stat().st_size for path in paths))
            with progress.progress_bar(f"{out.name} (joining)", parts) as tick, Writer(out, settings) as joined:
                for path in paths:
                    joined.copy(path)
                    tick()
            command, seconds = shlex.join(["python", *sys.argv]), round(time.monotonic() - started, 1)
            manifest = {"command": command, "seconds": seconds, "settings": dict(settings)}
            manifest |= {"sha256": filesystem.sha256(out), "bytes": out.stat().st_size}
            doubts = checks.warn_of_content(Trajectories(out))
            manifest |= {"warnings": doubts} if doubts else {}
            text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            filesystem.write_atomically(out.with_name(out.name + ".manifest.json"), text.encode())
        except OSError as error:
            reason = filesystem.describe_os_error(error, out)
            raise Failure(f"{reason}; correct that, then run the same command again") from error
        shutil.rmtree(folder)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s")


def _make_missing(
    name: str, make: Callable[[int], int], paths: Sequence[Path], pool: Executor, unit: str, steps: Steps | None
) -> None:
    """Make the parts that do not exist yet, with a progress bar."""
    missing = [k for k, path in enumerate(paths) if not path.exists()]
    sizes, title = (steps.sizes, f"{name} ({steps.unit})") if steps else ([1] * len(paths), name)
    complete, shown, note = sum(sizes) - sum(sizes[k] for k in missing), 0, ""
    with progress.progress_bar(title, sum(sizes), initial=complete) as tick:
        try:
            futures = {pool.submit(make, k): k for k in missing}
            while futures:
                for future in wait(futures, POLL_S if steps else None, FIRST_COMPLETED).done:
                    note, complete = f"{unit} {future.result()}", complete + sizes[futures.pop(future)]
                reached = sum(steps.reached(k) for future, k in futures.items() if future.running()) if steps else 0
                # a part's own count disappears a little before the part is complete
                shown = max(shown, complete + reached)
                tick(note, completed=shown)
        finally:
            pool.shutdown(cancel_futures=True)


def read_count(path: Path) -> int:
    """The progress that a process writes to a file as a number; 0 while there is none."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0
