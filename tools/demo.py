"""The complete workflow on a fluid: partition, verify, train a simulator on two processes, roll it out, plot.

`make demo` runs it; all output goes to runs/demo. Example: .venv/bin/python tools/demo.py --epochs 20
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per process; must be set before torch is imported

import numpy as np
import pandas as pd

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.partition import store_inputs, write_store
from dist_egnn.commands.train import run_training
from dist_egnn.commands.verify import run_verification
from dist_egnn.data import domain
from dist_egnn.data.store import Store
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.evaluate.rollout import run_rollout
from dist_egnn.evaluate.step_errors import BASELINES
from dist_egnn.evaluate.vtkhdf import Rollout
from dist_egnn.train.metrics import mean_squared_error
from dist_egnn.utils.console import print_table
from dist_egnn.utils.filesystem import write_atomically
from dist_egnn.viz import rollout_figure

HERE = Path(__file__).resolve().parent.parent
RECIPE = HERE / "recipes" / "fluid113k"
TEST, START, STEPS = 5, 15, 40  # the test trajectory of sample.h5, first frame and steps of the rollout
LISTED = [5, 10, 20, 40]  # steps in the table
DRAWN = [5, 15, 25, 40]  # steps in the picture


def settings(out: Path, epochs: int) -> config.Config:
    """The recipe's simulator with virtual nodes, on a store of two parts."""
    path, run = f"data.path={out / 'store'}", f"run.dir={out / 'simulator'}"
    return config.load(RECIPE / "simulator.yaml", [path, run, "model.name=FastEGNN", f"train.epochs={epochs}"])


def rms_mm(mse: pd.Series) -> pd.Series:
    """The root mean square distance in mm, from the MSE over nodes and components in m²."""
    return 1e3 * np.sqrt(3 * mse)


def one_step_ballistic(store: Store) -> float:
    """The MSE of x + v + g, clamped to the box, over the test split; m²."""
    pairs = []
    for graph in map(store.whole, store.split("test")):
        around = domain.get(graph)
        assert around is not None
        low, high = around.points[0, [0, -1]]  # the corners of the box
        ahead = graph.ndata["x"] + graph.ndata["v"] + around.gravity
        pairs.append((ahead.clamp(low, high), graph.ndata["y"]))
    return mean_squared_error(pairs, SingleProcess())


def check_output(out: Path) -> None:
    """Delete an earlier demo in the folder. Raises Failure if it holds anything else."""
    if not out.exists():
        return
    if any(out.iterdir()) and not (out / "store.partial").exists() and not (out / "store" / "manifest.yaml").is_file():
        raise Failure(f"{out}: exists and is not the output of a demo; choose another folder with --out")
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training split (default 12)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "runs" / "demo", help="output folder; an earlier demo in it is replaced"
    )
    options = parser.parse_args()
    out: Path = options.out.relative_to(Path.cwd()) if options.out.is_relative_to(Path.cwd()) else options.out
    check_output(out)
    started = time.perf_counter()

    print("1. Partition the fluid into 2 parts with METIS")
    demo = settings(out, options.epochs)
    source = settings(out, options.epochs)
    source.data.path, source.partition.parts = str(RECIPE / "sample.h5"), 2
    write_store(*store_inputs(source), out / "store")

    print("\n2. Verify the store, and that two processes compute the same as one")
    run_verification(out / "store", demo)

    print(f"\n3. Train a simulator on two processes, {options.epochs} epochs")
    run_training(demo)

    print("\n4. Roll it out on two processes")
    run, file = out / "simulator", out / "rollout.vtkhdf"
    table = run_rollout(run, data=RECIPE / "sample.h5", trajectory=TEST, start=START, steps=STEPS, out=file)

    print("\n5. Errors on the test trajectory")
    one_step = run_evaluation(run) | {"ballistic": one_step_ballistic(Store(out / "store"))}
    columns = {name: f"{name}_mse" for name in BASELINES} | {demo.model.name: "mse"}
    distances = {name: rms_mm(table[column])[LISTED] for name, column in columns.items()}
    rows = [[name, f"{3e6 * one_step[name]:.1f}", *(f"{mm:.3g}" for mm in distances[name])] for name in columns]
    table_title = f"mean squared distance after one step; root mean square distance after steps from frame {START} on"
    print_table(table_title, ["prediction", "one step [mm²]", *(f"{step} steps [mm]" for step in LISTED)], rows)
    trained = f"{options.epochs} epochs on two processes"
    title = f"A fluid falls into a box: {demo.model.name} predicts {STEPS} steps from frame {START}, after {trained}"
    with Rollout(file) as rollout:
        drawn = rollout_figure.picture(rollout, table, DRAWN, title, rollout_figure.Units("m", "s", "J"))
    write_atomically(out / "report.png", drawn)
    print(f"\nPicture: {out / 'report.png'}   all output: {out}   {time.perf_counter() - started:.0f} s")
    best = table[[columns[name] for name in BASELINES]].min(axis=1)
    if worse := [step for step in LISTED if not table["mse"][step] < best[step]]:
        raise Failure(
            f"not better than the baselines at steps {worse}; train longer (--epochs) or report this as a bug"
        )


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
