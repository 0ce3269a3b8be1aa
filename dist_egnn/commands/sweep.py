"""`distegnn sweep`: every run of a sweep file, trained and evaluated once; a table and a picture of what is finished.

Each run is a process of its own. A killed sweep takes its runs along, and the next one goes on from their checkpoints.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import config as configs
from ..data import dataset
from ..train import checkpoint, run_dir
from ..utils import filesystem
from ..utils.console import print_table
from ..utils.filesystem import write_atomically
from ..utils.progress import progress_bar
from ..viz import plots
from . import sweep_config
from .evaluate import run_evaluation
from .partition import run_partition
from .sweep_config import Run, Sweep, short
from .train import run_training

NUMBERS = ("valid_mse", "epochs", "epoch_s", "seconds", "parameters", "processes", "peak_gb")
BUSY = "another sweep is at work there; wait for it or choose another out"


def _leave_with_parent() -> None:
    """End with the sweep: a killed one leaves no run behind that the next one would meet."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: Run) -> None:
    """Train and evaluate, in a process of its own; what is printed goes to log.txt."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    folder = run.folder
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if run.store:
        run_partition(run.config, run.store)
    run_training(run.config, run_dir.can_resume(folder))
    test = run_evaluation(folder)[run.config.model.name]
    epochs = pd.read_csv(folder / "metrics.csv")
    found = {
        "test_mse": test,
        "valid_mse": float(epochs["valid_mse"].min()),
        "epochs": len(epochs),
        "epoch_s": float(epochs["epoch_s"].mean()),
        "seconds": float(epochs["epoch_s"].sum()),
        "parameters": sum(t.numel() for t in checkpoint.load(folder / "best.pt")["model"].values()),
        "processes": dataset.process_count(run.config),
        "peak_gb": float(epochs["peak_gb"].max()),
    }
    write_atomically(folder / "result.json", (json.dumps(found, indent=1) + "\n").encode())


def execute(sweep: Sweep, jobs: int = 1, minutes: float = math.inf) -> dict[str, str]:
    """Do the runs that are not finished, ``jobs`` at a time, none begun after ``minutes``; failed run → its last line."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    deadline, failed = time.monotonic() + 60 * minutes, {}
    live: dict[Any, tuple[Run, Any]] = {}
    with (
        filesystem.lock_folder(sweep.out, BUSY),
        progress_bar("runs", len(sweep.runs), initial=len(sweep.runs) - sweep.missing()) as tick,
    ):
        queue = [run for run in sweep.runs if run.result() is None]
        try:
            while live or (queue and time.monotonic() < deadline):
                # a store is made by one run; others that need it wait until it is complete
                made = {r.store for r, _ in live.values() if r.store and not (r.store / "manifest.yaml").is_file()}
                ready = next((k for k, r in enumerate(queue) if r.store not in made), None)
                if ready is not None and len(live) < jobs and time.monotonic() < deadline:
                    run = queue.pop(ready)
                    run.folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(run.folder / "wanted.yaml", configs.to_yaml(run.config).encode())
                    process = context.Process(target=_work, args=(run,))
                    process.start()
                    live[process.sentinel] = run, process
                    continue
                for sentinel in wait(list(live), timeout=0.5):
                    run, process = live.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        failed[run.folder.name] = _last_line(run.folder / "log.txt", process.exitcode)
                    tick(run.folder.name)
        finally:
            for _, process in live.values():
                process.terminate()
                process.join()
    return failed


def _last_line(log: Path, code: int) -> str:
    """Why a run failed: the last line of its traceback, unless it was killed (a negative exit code)."""
    if code < 0:
        return f"died (exit code {code}); was it killed, or short of memory?"
    lines = log.read_text().strip().splitlines() if log.is_file() else []
    return re.sub(r"^dist_egnn\.errors\.Failure: ", "", lines[-1]) if lines else f"exit code {code}, no log"


def table(sweep: Sweep) -> pd.DataFrame:
    """One row a setting with a finished run: mean and standard deviation over its seeds; results.csv, runs.csv, plot.png."""
    done: dict[str, list[tuple[Run, dict[str, float]]]] = {}
    for run in sweep.runs:
        if (result := run.result()) is not None:
            done.setdefault(run.setting, []).append((run, result))
    rows, single = [], []
    for group in done.values():
        cells = {k: group[0][0].cell(k) for k in sweep.varying}
        numbers = pd.DataFrame([result for _, result in group])
        test = {"test_mse": numbers["test_mse"].mean(), "test_mse_std": numbers["test_mse"].std()}
        rows.append({**cells, "seeds": len(group), **test, **numbers[[*NUMBERS]].mean()})
        single += [{**cells, "seed": run.config.train.seed, **result} for run, result in group]
    found = pd.DataFrame(rows)
    if not rows:
        return found
    if sweep.baseline:
        base = found[[all(row[k] == v for k, v in sweep.baseline.items()) for row in rows]]
        by = [k for k in sweep.varying if base[k].nunique() > 1]  # each row's own: the one with these alike
        reference = found[by].merge(base[[*by, "test_mse"]], on=by, how="left") if by else base[["test_mse"]]
        values = reference["test_mse"] if by else next(iter(reference["test_mse"]), math.nan)
        found.insert(found.columns.get_loc("test_mse_std") + 1, "of_baseline", found["test_mse"] / values)
    write_atomically(sweep.out / "results.csv", found.to_csv(index=False).encode())
    write_atomically(sweep.out / "runs.csv", pd.DataFrame(single).to_csv(index=False).encode())
    if sweep.x:
        curves: dict[str, dict[str, tuple[float, float]]] = {}
        for row in found.fillna({"test_mse_std": 0.0}).to_dict("records"):
            lines = [f"{short(k)} {row[k]}" for k in sweep.lines if row[k]]
            x = row[sweep.x] if lines or not sweep.lines else ""  # what lies on no line is a level, as what has no x
            name = ", ".join(lines) or (f"{short(sweep.x)} {row[sweep.x]}" if sweep.lines else "all")
            curves.setdefault(name, {})[x] = row["test_mse"], row["test_mse_std"]
        reached = {x for points in curves.values() for x in points}
        ticks = [x for x in dict.fromkeys(run.cell(sweep.x) for run in sweep.runs) if x in reached and x]
        plots.sweep(sweep.out / "plot.png", sweep.x, ticks, curves)
    return found


def show(sweep: Sweep, found: pd.DataFrame, failed: dict[str, str]) -> None:
    """Print the table, what is missing, and what failed and why."""
    if len(found):
        header = [*map(short, sweep.varying), "seeds", "test MSE", *(["of baseline"] if sweep.baseline else [])]
        lines = []
        for row in found.to_dict("records"):
            spread = "" if math.isnan(row["test_mse_std"]) else f" ± {row['test_mse_std']:.1e}"
            cells = [*(row[k] for k in sweep.varying), row["seeds"], f"{row['test_mse']:.4e}{spread}"]
            if sweep.baseline:
                cells.append("" if math.isnan(row["of_baseline"]) else f"{row['of_baseline']:.3f}")
            last = (f"{row['epochs']:g}", f"{row['epoch_s']:.2f}", f"{row['seconds']:.1f}", f"{row['parameters']:,.0f}")
            lines.append([*cells, *last, f"{row['processes']:g}", f"{row['peak_gb']:.2f}"])
        header += ["epochs", "s/epoch", "s", "parameters", "processes", "GB/process"]
        title = f"{sweep.out}: test MSE of the best epoch, mean ± deviation over seeds"
        print_table(title, header, lines, len(sweep.varying))
    if missing := sweep.missing():
        print(f"{sweep.out}: {missing} of {len(sweep.runs)} runs are missing; the same command goes on with them")
    for name, line in failed.items():
        print(f"failed: {sweep.out / name}: {line}", file=sys.stderr)


def run_sweep(file: Path, jobs: int, minutes: float, table_only: bool) -> bool:
    """Do the runs of a sweep file that are missing, then write and print its results. Returns whether no run failed."""
    sweep = sweep_config.load(file)
    failed: dict[str, str] = {}
    if not table_only:
        sweep_config.check(sweep)
        failed = execute(sweep, jobs, minutes)
    show(sweep, table(sweep), failed)
    return not failed
