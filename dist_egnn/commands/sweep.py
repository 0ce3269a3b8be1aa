"""`distegnn sweep`: train and evaluate each run of a sweep file once; write a table and a plot of the finished runs.

Each run has a process of its own, which ends with the sweep; the next sweep resumes it from its checkpoint.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import config as configs
from ..data import dataset, identity
from ..distributed.spawn import exit_with_parent, without_script
from ..evaluate.rollout_metrics import evaluate_rollouts, summarize
from ..train import checkpoint, run_dir
from ..train.metrics import prediction_name
from ..utils.console import guard_streams, print_table
from ..utils.filesystem import lock_folder, lock_output, write_atomically
from ..utils.progress import progress_bar
from ..viz import plots
from . import sweep_config
from .evaluate import run_evaluation
from .partition import run_partition
from .sweep_config import Run, Sweep, short
from .train import run_training

NUMBERS = ("valid_mse", "epochs", "epoch_s", "seconds", "parameters", "processes", "peak_gb")
BUSY = "another sweep is at work there; wait for it or choose another out"


def _run_process(run: Run, sweep_pid: int) -> None:
    """The process of a run: train, evaluate, and write result.json. Its output goes to log.txt."""
    exit_with_parent(sweep_pid)  # a killed sweep must leave no run behind that the next sweep would meet
    folder = run.folder
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    guard_streams()
    torch.set_num_threads(1)
    data = Path(run.config.data.path)
    if run.store:
        run_partition(run.config, run.store)  # puts the store in place of the file
    run_training(run.config, run_dir.can_resume(folder))
    best = checkpoint.load(folder / "best.pt")
    errors, epochs = run_evaluation(folder), pd.read_csv(folder / "metrics.csv")
    parameters = sum(t.numel() for t in best["model"].values())
    result: dict[str, Any] = {
        "test_mse": errors[prediction_name(run.config.model)],
        "valid_mse": float(epochs["valid_mse"].min()),
    }
    result |= {"epochs": len(epochs), "epoch_s": float(epochs["epoch_s"].mean())}
    result |= {"seconds": float(epochs["epoch_s"].sum()), "parameters": parameters}
    result |= {"processes": dataset.process_count(run.config), "peak_gb": float(epochs["peak_gb"].max())}
    result["data"] = identity.digest(best.get("data"))
    if run.rollout:
        result |= _judge_rollouts(run, data)
    write_atomically(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def _judge_rollouts(run: Run, data: Path) -> dict[str, Any]:
    """The errors of rollouts of the test trajectories: rms_STEP, energy_error and outside; NaN if one of them stopped early."""
    table, stopped = evaluate_rollouts(run.folder, data=data, **run.rollout)
    for trajectory, reason in stopped.items():
        print(f"warning: trajectory {trajectory}: stopped at {reason}")
    summary = summarize(table)
    errors = {f"rms_{step}": float(rms) for step, rms in summary["rms"].items()}
    last = summary.iloc[-1]
    return {**errors, **{k: float(last[k]) for k in ("energy_error", "outside")}, "rollout": dict(run.rollout)}


def execute(sweep: Sweep, jobs: int = 1, minutes: float = math.inf) -> dict[str, str]:
    """Do the missing runs, ``jobs`` at a time; start none after ``minutes``. Returns why runs failed, by name."""
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline, failed, context = time.monotonic() + 60 * minutes, {}, multiprocessing.get_context("spawn")
    live: dict[Any, tuple[Run, SpawnProcess]] = {}
    finished = len(sweep.runs) - sweep.missing()
    with lock_folder(sweep.out, BUSY), progress_bar("runs", len(sweep.runs), initial=finished) as tick:
        queue = [run for run in sweep.runs if run.result() is None]
        try:
            while live or (queue and time.monotonic() < deadline):
                # one run writes a store; the others that need it wait until it is complete
                stores = {run.store for run, _ in live.values() if run.store}
                unfinished = {store for store in stores if not (store / "manifest.yaml").is_file()}
                ready = next((k for k, r in enumerate(queue) if r.store not in unfinished), None)
                if ready is not None and len(live) < jobs and time.monotonic() < deadline:
                    run = queue.pop(ready)
                    run.folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(run.folder / "wanted.yaml", configs.to_yaml(run.config).encode())
                    process = context.Process(target=_run_process, args=(run, os.getpid()))
                    with without_script(run.config):
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
    lines = log.read_text(encoding="utf-8").strip().splitlines() if log.is_file() else []
    return re.sub(r"^dist_egnn\.errors\.Failure: ", "", lines[-1]) if lines else f"exit code {code}, no log"


def write_table(sweep: Sweep) -> pd.DataFrame:
    """Write runs.csv, results.csv and plot.png. Returns one row per setting: means over the finished seeds."""
    finished = [(run, result) for run in sweep.runs if (result := run.result()) is not None]
    rows, single = [], []
    for setting in dict.fromkeys(run.setting for run, _ in finished):
        group = [(run, result) for run, result in finished if run.setting == setting]
        cells = {k: group[0][0].cell(k) for k in sweep.varying}
        numbers = pd.DataFrame([result for _, result in group])
        test = {"test_mse": numbers["test_mse"].mean(), "test_mse_std": numbers["test_mse"].std()}
        errors = numbers[[k for k in numbers if k.startswith("rms_") or k in ("energy_error", "outside")]]
        means = {
            **numbers[[*NUMBERS]].mean(),
            **errors.mean(skipna=False),
            **errors.std(skipna=False).add_suffix("_std"),
        }
        rows.append({**cells, "seeds": len(group), **test, **means})
        single += [{**cells, "seed": run.config.train.seed, **result} for run, result in group]
    table = pd.DataFrame(rows)
    if not rows:
        return table
    if sweep.baseline:
        table.insert(table.columns.get_loc("test_mse_std") + 1, "of_baseline", _ratios(sweep, table))
    with lock_output(sweep.out / "results.csv", wait_s=60):  # --table may run beside a sweep
        write_atomically(sweep.out / "results.csv", table.to_csv(index=False).encode())
        write_atomically(sweep.out / "runs.csv", pd.DataFrame(single).to_csv(index=False).encode())
        if sweep.x:
            _plot(sweep, table)
    return table


def _ratios(sweep: Sweep, table: pd.DataFrame) -> pd.Series:
    """Each row's test error, relative to the baseline with the same values of the keys in which baselines differ."""
    baselines = table[(table[[*sweep.baseline]] == pd.Series(sweep.baseline)).all(axis=1)]
    if by := [k for k in sweep.varying if baselines[k].nunique() > 1]:
        return table["test_mse"] / table[by].merge(baselines[[*by, "test_mse"]], on=by, how="left")["test_mse"]
    return table["test_mse"] / next(iter(baselines["test_mse"]), math.nan)


def _plot(sweep: Sweep, table: pd.DataFrame) -> None:
    curves: dict[str, dict[str, tuple[float, float]]] = {}
    for row in table.fillna({"test_mse_std": 0.0}).to_dict("records"):
        labels = [f"{short(k)} {row[k]}" for k in sweep.lines if row[k]]
        x = row[sweep.x] if labels or not sweep.lines else ""  # a row without a curve is a level line, as one without x
        name = ", ".join(labels) or (f"{short(sweep.x)} {row[sweep.x]}" if sweep.lines else "all")
        curves.setdefault(name, {})[x] = row["test_mse"], row["test_mse_std"]
    values = dict.fromkeys(run.cell(sweep.x) for run in sweep.runs)
    ticks = [x for x in values if x and any(x in points for points in curves.values())]
    plots.sweep(sweep.out / "plot.png", sweep.x, ticks, curves)


def print_results(sweep: Sweep, table: pd.DataFrame, failed: dict[str, str]) -> None:
    """Print the table, the number of missing runs, and why runs failed."""
    if len(table):
        header = [*map(short, sweep.varying), "seeds", "test MSE", *(["of baseline"] if sweep.baseline else [])]
        lines, rollouts = [], [k for k in table if k.startswith("rms_") and not k.endswith("_std")]
        for row in table.to_dict("records"):
            spread = "" if math.isnan(row["test_mse_std"]) else f" ± {row['test_mse_std']:.1e}"
            cells = [*(row[k] for k in sweep.varying), row["seeds"], f"{row['test_mse']:.4e}{spread}"]
            if sweep.baseline:
                cells.append("" if math.isnan(row["of_baseline"]) else f"{row['of_baseline']:.3f}")
            for k in rollouts:
                spread = "" if math.isnan(row[f"{k}_std"]) else f" ± {row[f'{k}_std']:.1g}"
                cells.append("stopped" if math.isnan(row[k]) else f"{row[k]:.3g}{spread}")
            cost = f"{row['epochs']:g}", f"{row['epoch_s']:.2f}", f"{row['seconds']:.1f}", f"{row['parameters']:,.0f}"
            lines.append([*cells, *cost, f"{row['processes']:g}", f"{row['peak_gb']:.2f}"])
        header += [k.replace("_", " ") for k in rollouts]
        header += ["epochs", "s/epoch", "s", "parameters", "processes", "GB/process"]
        title = f"{sweep.out}: test MSE of the best epoch, mean ± deviation over seeds"
        title += "; rms error of rollouts by step" if rollouts else ""
        print_table(title, header, lines, len(sweep.varying))
    if missing := sweep.missing():
        print(f"{sweep.out}: {missing} of {len(sweep.runs)} runs are missing; repeat the command to do them")
    for name, line in failed.items():
        print(f"failed: {sweep.out / name}: {line}", file=sys.stderr)


def run_sweep(file: Path, jobs: int, minutes: float, table_only: bool) -> bool:
    """Do the missing runs of a sweep file, then write and print its results. Returns whether no run failed."""
    sweep = sweep_config.load(file)
    if not table_only:
        sweep_config.check_data(sweep)
    failed = {} if table_only else execute(sweep, jobs, minutes)
    sweep_config.check_same_data(sweep)  # the data may have changed meanwhile
    print_results(sweep, write_table(sweep), failed)
    return not failed
