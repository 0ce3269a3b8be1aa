"""What the tests of training share: runs of milliseconds a step, and what must be equal of two runs that are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from small import DATA

from dist_egnn import config
from dist_egnn.train import checkpoint, trainer

PLAIN_STEPS, PLAIN_TRAIN = trainer.steps, trainer.train
# 6 training samples, so 3 steps an epoch; the rate changes in the first epoch from step to step, then from epoch to epoch
SETTINGS = ["model.hidden=4", "model.layers=1", "train.accumulate=2", "train.clip=0.5", "train.lr=1e-2"]
SETTINGS += ["train.schedule=cosine", "train.warmup=0.9", "train.checkpoint_minutes=0"]


def settings(data: Path, run: Path, *more: str) -> config.Config:
    given = [f"data.{k}={v}" for k, v in DATA.items()]
    given = [g.replace("'", "") for g in given]
    return config.load(None, [*given, *SETTINGS, f"data.path={data}", f"run.dir={run}", *more])


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that does not tell the time: rows as text, tensors, where the checkpoints stand."""
    rows = pd.read_csv(run / "metrics.csv", dtype=str)
    found: dict[str, Any] = {"rows": rows[[c for c in rows if c != "peak_gb" and not c.endswith("_s")]].values.tolist()}
    for name in ("last.pt", "best.pt"):
        state = checkpoint.load(run / name)
        tensors = {
            **state["model"],
            **{f"{k}.{n}": t for k, s in state["optimizer"]["state"].items() for n, t in s.items()},
        }
        found |= {f"{name} {key}": value for key, value in tensors.items()}
        found[f"{name} stand"] = [state[key] for key in ("epoch", "step", "best", "waited", "scale")]
        found[f"{name} rng"] = state["rng"]
    return found


def assert_same(run: Path, other: Path) -> None:
    a, b = outcome(run), outcome(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, (key, value, b[key])


class At:
    """Stands in for train.train: does something after the n-th step of a rank (None: of all); picklable, so ranks have it."""

    def __init__(self, step: int, rank: int | None, act: Any, *args: Any) -> None:
        self.step, self.rank, self.act, self.args = step, rank, act, args

    def __call__(self, comm: Any, *given: Any) -> Any:
        made = 0

        def steps(*arguments: Any) -> Any:
            nonlocal made
            for stop in PLAIN_STEPS(*arguments):
                made += 1
                if made == self.step and self.rank in (None, comm.rank):
                    self.act(*self.args)
                yield stop

        trainer.steps = steps
        try:
            return PLAIN_TRAIN(comm, *given)
        finally:
            trainer.steps = PLAIN_STEPS
