"""The complete workflow on a fluid: partition, verify, train EGNN and FastEGNN on two processes, evaluate, plot.

`make demo` runs it; all output goes to runs/demo. Example: .venv/bin/python tools/demo.py --epochs 20
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per process; must be set before torch is imported

import numpy as np
import pandas as pd
import torch
from dist_egnn.partition import store_writer

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.partition import write_store
from dist_egnn.commands.train import run_training
from dist_egnn.commands.verify import run_verification
from dist_egnn.data.store import Store
from dist_egnn.data.store_inputs import store_widths
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, trainer
from dist_egnn.train.metrics import fitted_time, mean_squared_error
from dist_egnn.utils.console import print_table
from dist_egnn.utils.filesystem import write_atomically
from dist_egnn.viz import plots
from dist_egnn.viz.html_report import node_parts

HERE = Path(__file__).resolve().parent.parent
RECIPE = HERE / "recipes" / "fluid113k"
MODELS = ("EGNN", "FastEGNN")


def settings(out: Path, name: str, epochs: int) -> config.Config:
    """A shorter version of the recipe's config: fewer frames and epochs, a step after each snapshot, a larger rate."""
    return config.load(
        RECIPE / "config.yaml",
        [
            "data.frames=10",
            f"data.path={out / 'store'}",
            f"run.dir={out / name}",
            f"model.name={name}",
            "train.accumulate=1",
            "train.lr=2e-3",
            "train.schedule=cosine",
            f"train.epochs={epochs}",
        ],
    )


def picture(out: Path, store: Store, epochs: int) -> None:
    """Write report.png: the best checkpoints on one test snapshot, and their validation errors."""
    number = store.split("test")[len(store.split("test")) // 2]
    graph = store.whole(number)
    x, y = graph.ndata["x"].numpy(), graph.ndata["y"].numpy()
    predicted, virtual = {}, np.zeros((0, 3))
    widths = store_widths(store.inputs)
    for name in MODELS:
        model = trainer.build_model(settings(out, name, epochs), widths, SingleProcess())
        path = out / name / "best.pt"
        checkpoint.load_weights(model, checkpoint.load(path), path)
        with torch.no_grad():
            positions, z = model(graph)
        predicted[name], virtual = positions.numpy(), z[0].numpy()
    t = fitted_time((store.whole(n) for n in store.split("train")), SingleProcess())
    valid = [store.whole(n) for n in store.split("valid")]
    baselines = {
        name: mean_squared_error(((g.ndata["x"] + s * g.ndata["v"], g.ndata["y"]) for g in valid), SingleProcess())
        for name, s in (("static", 0.0), ("linear", t))
    }
    lines = {name: pd.read_csv(out / name / "metrics.csv")["valid_mse"].tolist() for name in MODELS}
    axis = range(1, epochs + 1), lines, baselines, "epoch", "validation MSE [m²]"
    panels: dict[str, Callable[[Any], None]] = {
        f"Input, coloured by partition ({store.parts} parts)": lambda f: plots.parts(f, x, node_parts(store, number)),
        f"Target, {name}, and virtual nodes after the last layer": lambda f: plots.positions(
            f, y, predicted[name], virtual
        ),
        "Displacement of each particle of one test snapshot [m]": lambda f: plots.displacement(f, x, y, predicted),
        "Validation error": lambda f: plots.curves(f, *axis),
    }
    title = f"Fluid, {len(x):,} particles, {store.inputs['horizon']} frames ahead: two processes, METIS"
    write_atomically(out / "report.png", plots.png_of_panels(title, panels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=7, help="passes over the training split for each model (default 7)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "runs" / "demo", help="output folder; an earlier demo in it is replaced"
    )
    options = parser.parse_args()
    out: Path = options.out
    if out.exists():
        # delete only the output of an earlier demo
        if not (out / "store.partial").exists() and not (out / "store" / "manifest.yaml").is_file():
            raise Failure(f"{out}: exists and is not the output of a demo; choose another folder with --out")
        shutil.rmtree(out)
    started = time.perf_counter()

    print("1. Partition the fluid into 2 parts with METIS")
    file = Trajectories(RECIPE / "sample.h5")
    data = settings(out, "EGNN", 1).data
    inputs = store_writer.build_inputs(file, parts=2, method="metis", settings=data)
    write_store(file, inputs, out / "store")
    store = Store(out / "store")

    print("\n2. Verify the store, and that two processes compute the same as one")
    run_verification(out / "store", settings(out, "FastEGNN", 1))

    print(f"\n3. Train on two processes, {options.epochs} epochs for each model")
    errors, statistics = {}, {}
    for name in MODELS:
        statistics[name] = run_training(settings(out, name, options.epochs))
        errors[name] = run_evaluation(out / name)

    rows = [[name, f"{errors['EGNN'][name]:.3e}", "", ""] for name in ("static", "linear")]
    for name in MODELS:
        last = statistics[name]
        rows.append([name, f"{errors[name][name]:.3e}", f"{last['step_s']:.3f}", f"{last['peak_gb']:.2f}"])
    print("\n4. Errors on the test trajectory, 20 frames ahead")
    print_table(
        f"edges cut by the partition: {store.summary()['edge_cut']:.1%}; linear: x + t·v with t fitted on the training split",
        ["prediction", "test MSE [m²]", "s/step", "GB/process"],
        rows,
    )
    picture(out, store, options.epochs)
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"\nPicture: {shown / 'report.png'}   all output: {shown}   {time.perf_counter() - started:.0f} s")
    worse = [name for name in MODELS if not errors[name][name] < errors[name]["linear"]]
    if worse:
        raise Failure(
            f"{', '.join(worse)} is not better than linear extrapolation; train longer (--epochs) or report this as a bug"
        )


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
