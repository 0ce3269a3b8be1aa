"""Runs with steps of milliseconds for the tests of training, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from small_data import DATA

from dist_egnn import config
from dist_egnn.commands import train
from dist_egnn.train import checkpoint, trainer

PLAIN_STEPS, PLAIN_TRAIN = trainer.Trainer.steps, trainer.train
# 6 training samples, so 3 steps an epoch; the rate changes from step to step in the first epoch, then by epochs
SETTINGS = ["model.hidden=4", "model.layers=1", "train.accumulate=2", "train.clip=0.5", "train.lr=1e-2"]
SETTINGS += ["train.schedule=cosine", "train.warmup=0.9", "train.checkpoint_minutes=0"]


def settings(data: Path, run: Path, *more: str) -> config.Config:
    given = [f"data.{key}={value}".replace("'", "") for key, value in DATA.items()]
    return config.load(None, [*given, *SETTINGS, f"data.path={data}", f"run.dir={run}", *more])


def outcome(run: Path) -> dict[str, Any]:
    """Everything in a run that does not depend on time: rows as text, tensors, training state."""
    rows = pd.read_csv(run / "metrics.csv", dtype=str).drop(columns="peak_gb").filter(regex="(?<!_s)$")
    result: dict[str, Any] = {"rows": rows.values.tolist()}
    for name in ("last.pt", "best.pt"):
        saved = checkpoint.load(run / name)
        result |= {f"{name} {key}": value for key, value in saved["model"].items()}
        result |= {f"{name} unaveraged {key}": value for key, value in saved.get("unaveraged", {}).items()}
        for number, values in saved["optimizer"]["state"].items():
            result |= {f"{name} {number}.{key}": value for key, value in values.items()}
        result |= {f"{name} {key}": saved[key] for key in ("rng", "epoch", "step", "best", "waited", "scale")}
    return result


def assert_same(run: Path, other: Path) -> None:
    a, b = outcome(run), outcome(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, (key, value, b[key])


def file_contents(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}


def resume_training(run: Path, overrides: list[str]) -> dict[str, float]:
    """As `distegnn train --resume`."""
    return train.run_training(train.resumed_config(run, overrides), resume=True)


class ActAfterStep:
    """Replaces trainer.train, also in ranks: calls act(*args) after the n-th step of a rank (None: of all)."""

    def __init__(self, step: int, rank: int | None, act: Callable[..., object], *args: Any) -> None:
        self.step, self.rank, self.act, self.args = step, rank, act, args

    def __call__(self, comm: Any, *given: Any) -> Any:
        count = 0

        def steps(training: trainer.Trainer) -> Any:
            nonlocal count
            for stop in PLAIN_STEPS(training):
                count += 1
                if count == self.step and self.rank in (None, comm.rank):
                    self.act(*self.args)
                yield stop

        trainer.Trainer.steps = steps  # type: ignore[method-assign]
        try:
            return PLAIN_TRAIN(comm, *given)
        finally:
            trainer.Trainer.steps = PLAIN_STEPS  # type: ignore[method-assign]
