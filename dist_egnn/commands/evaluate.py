"""`distegnn evaluate`: errors of a run's best checkpoint on one split, of single predictions or of rollouts."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import Config, Partition
from ..data import checks, dataset, identity
from ..data.trajectories import SPLITS, Trajectories
from ..distributed import spawn
from ..errors import Failure
from ..evaluate import rollout_metrics
from ..train import checkpoint, run_dir, trainer
from ..utils.console import print_table
from ..utils.filesystem import lock_output, sha256, write_atomically
from .partition import run_partition

LOCK_WAIT_S = 10.0  # another evaluation writes its rows meanwhile


def run_evaluation(run: Path, split: str = "test", data: Path | None = None) -> dict[str, float]:
    """Mean squared error of each prediction, on as many processes as in training; also written to evaluate.csv.

    data: a trajectories file or a store in place of the run's data. Raises Failure for data that do not fit the run, and
    if the run's own data have changed since the training.
    """
    if split not in SPLITS:
        raise Failure(f"--split {split}: use one of {', '.join(SPLITS)}")
    config = run_dir.load_config(run)
    try:
        trainer.resolve_device(config)
    except Failure as failure:  # no option sets the device: name the file that does
        raise Failure(f"{run / run_dir.CONFIG}: {failure}") from failure
    best = run / run_dir.BEST
    trained, weights = checkpoint.load(best).get("data"), sha256(best)
    with ExitStack() as stack:
        path = config.data.path if data is None else str(data.absolute())
        parts = None if dataset.is_store(path) else dataset.used_partition(config)
        evaluated = identity.of_data(path)
        if data is None:
            checkpoint.compare_data(trained, evaluated, config.data, run)
        else:
            config = _replace_data(config, path, trained, evaluated)
            if parts and parts.parts > 1:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="distegnn-evaluate-"))
                run_partition(replace(config, partition=parts), Path(folder, "store"))
        processes, timeout_s = dataset.process_count(config), config.train.timeout_s
        given = config, best, split, data is not None
        errors = spawn.run_ranks(trainer.evaluate, processes, *given, timeout_s=timeout_s)[0]
    if sha256(best) != weights:
        raise Failure(f"{best}: was replaced during the evaluation; evaluate again")
    about = {"weights": weights, "data": identity.digest(evaluated), "path": path}
    _write(run, pd.DataFrame([{"split": split, "prediction": k, "mse": v, **about} for k, v in errors.items()]))
    return errors


def _replace_data(
    config: Config, path: str, trained: identity.Identity | None, given: identity.Identity | None
) -> Config:
    """The config with other data, after comparing them with those of the training."""
    if trained and given:
        identity.check_fits(trained, given, config.data, path, Path(config.run.dir))
    if not dataset.is_store(path):
        checks.warn_of_content(Trajectories(path))
    features = identity.resolve_features(config.data, trained)
    partition = Partition(halo=config.partition.halo)  # the rest follows from a store
    return replace(config, data=replace(config.data, path=path, features=features), partition=partition)


def _write(run: Path, table: pd.DataFrame) -> None:
    """Write rows of evaluate.csv, in place of those of the same split and data and of a table that cannot be read."""
    path, now = run / "evaluate.csv", table.iloc[0]
    try:
        with lock_output(path, wait_s=LOCK_WAIT_S):
            with suppress(FileNotFoundError, ValueError):  # ValueError: of pandas, for text that is no table
                before = pd.read_csv(path).reindex(columns=table.columns).dropna(subset=["split", "mse"])
                same = (before["split"] == now["split"]) & before["data"].fillna("").isin(["", now["data"]])
                table = pd.concat([before[~same], table])
            write_atomically(path, table.to_csv(index=False).encode())
    except Failure as failure:  # a read-only run can be evaluated all the same
        print(f"warning: {str(failure).partition(';')[0]}; the errors are printed only", file=sys.stderr)


def print_evaluation(run: Path, split: str, data: Path | None = None) -> None:
    """Evaluate a run and print the errors as a table."""
    errors = run_evaluation(run, split, data)
    linear = errors.get("linear", 0.0)  # zero where the data move in straight lines
    rows = [[name, f"{e:.4e}", f"{e / linear:.3f}" if linear > 0 else ""] for name, e in errors.items()]
    of = f" of {data}" if data else ""
    print_table(f"{run}: mean squared error, split {split}{of}", ["prediction", "MSE", "of linear"], rows)


def print_rollouts(run: Path, steps: int, split: str, trajectory: str | None, **options: Any) -> None:
    """Evaluate rollouts of a split's trajectories, or of those that ``trajectory`` names, and print a summary."""
    if split not in SPLITS:
        raise Failure(f"--split {split}: use one of {', '.join(SPLITS)}")
    table, stopped = rollout_metrics.evaluate_rollouts(run, steps, trajectory=trajectory or split, **options)
    for k, reason in stopped.items():
        print(f"warning: trajectory {k}: stopped at {reason}", file=sys.stderr)
    numbers, summary = list(dict.fromkeys(table["trajectory"])), rollout_metrics.summarize(table)
    names = {"rms": "rms error", "static": "static", "linear": "linear", "ballistic": "ballistic", "mse": "MSE to step"}
    names |= {"energy_error": "energy error", "sinkhorn": "Sinkhorn", "outside": "outside"}
    names = {name: title for name, title in names.items() if summary[name].notna().any()}

    def cell(row: pd.Series, name: str) -> str:
        value, spread = row[name], row[f"{name}_std"]
        form = ".1%" if name in ("energy_error", "outside") else ".3g"
        return "" if pd.isna(value) else f"{value:{form}}" + (f" ± {spread:{form}}" if pd.notna(spread) else "")

    rows = [[step, *(cell(row, name) for name in names)] for step, row in summary.iterrows()]
    title = f"{run}: rollouts of {steps} steps, " + (
        f"trajectory {numbers[0]}" if len(numbers) == 1 else f"mean ± standard deviation of {len(numbers)} trajectories"
    )
    print_table(title, ["step", *names.values()], rows)
    seconds, rate, particles = rollout_metrics.speed(table)
    print(f"{seconds:.1f} s, {rate:.3g} steps/s, {particles:.2g} particles/s; by step: {run / rollout_metrics.FILE}")
