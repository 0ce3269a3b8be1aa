"""`distegnn evaluate`: errors of a run's best checkpoint on one split."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from .. import config as configs
from ..data import dataset
from ..data.trajectories import SPLITS
from ..distributed import spawn
from ..errors import Failure
from ..train import run_dir, trainer
from ..utils.console import print_table
from ..utils.filesystem import replace_file, sha256


def run_evaluation(run: Path, split: str = "test") -> dict[str, float]:
    """Mean squared error of each prediction, on as many processes as in training; also written to evaluate.csv."""
    if split not in SPLITS:
        raise Failure(f"--split {split}: use one of {', '.join(SPLITS)}")
    run_dir.check_is_run(run)
    config = configs.load(run / "config.yaml", published=True)
    config.run.dir = str(run)
    try:
        trainer.resolve_device(config)
    except Failure as failure:  # no option sets the device: name the file that does
        raise Failure(f"{run / 'config.yaml'}: {failure}") from failure
    processes, timeout_s = dataset.process_count(config), config.train.timeout_s
    best = run / run_dir.BEST
    weights = sha256(best) if best.is_file() else ""
    errors = spawn.run_ranks(trainer.evaluate, processes, config, best, split, timeout_s=timeout_s)[0]
    if sha256(best) != weights:
        raise Failure(f"{best}: was replaced during the evaluation; evaluate again")
    table = pd.DataFrame([{"split": split, "prediction": k, "mse": v, "weights": weights} for k, v in errors.items()])
    if (path := run / "evaluate.csv").is_file():
        table = pd.concat([pd.read_csv(path).query("split != @split"), table])
    try:
        replace_file(path, table.to_csv(index=False).encode())
    except OSError as error:  # a read-only run can be evaluated all the same
        print(f"warning: {path}: not written ({error.strerror})", file=sys.stderr)
    return errors


def print_evaluation(run: Path, split: str) -> None:
    """Evaluate a run and print the errors as a table."""
    errors = run_evaluation(run, split)
    linear = errors["linear"]  # zero where the data move in straight lines
    rows = [[name, f"{e:.4e}", f"{e / linear:.3f}" if linear > 0 else ""] for name, e in errors.items()]
    print_table(f"{run}: mean squared error, split {split}", ["prediction", "MSE", "of linear"], rows)
