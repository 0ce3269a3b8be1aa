"""Where a run stands, how it is taken up again, and what a resume may change."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import config as configs
from ..config import Config, Train
from ..data.dataset import Dataset
from ..distributed.comm import Comm
from ..errors import Failure
from . import checkpoint, metrics, optim

# How a run is done, rather than what it computes; and what helps one that diverged or was given too little time.
FREE = (
    *("train.epochs", "train.patience", "train.lr", "train.clip"),
    *("train.device", "train.timeout_s", "train.checkpoint_minutes", "train.kept", "train.replicas"),
    *("model.engine", "model.tile", "data.path", "run.dir"),
    *("partition.parts", "partition.method", "partition.seed", "partition.weights"),
)


@dataclass
class Position:
    """All that steps change beside weights and the optimiser: the same on every rank.

    epoch: the one in work; step: optimiser steps of it that are done; sums: of these, see `train.steps`; best: lowest
    validation MSE; waited: epochs since; scale: of the learning rate, see optim.py.
    """

    epoch: int = 0
    step: int = 0
    best: float = math.inf
    waited: int = 0
    scale: float = 1.0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def over(self, settings: Train) -> bool:
        """Whether training is at its end."""
        at_end = self.epoch >= settings.epochs
        return at_end or bool(settings.patience and self.step == 0 and self.waited >= settings.patience)

    def end_epoch(self, valid_mse: float, settings: Train) -> bool:
        """Go to the start of the next epoch; whether the one that ended is the best so far."""
        improved = valid_mse < self.best
        self.best, self.waited = (valid_mse, 0) if improved else (self.best, self.waited + 1)
        self.scale = optim.lowered(settings, self.waited, self.scale)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, defaultdict(float)
        return improved


def position_of(state: dict[str, Any]) -> Position:
    """The position in a checkpoint; what an older version did not know is as at the start of an epoch."""
    names = ("epoch", "step", "best", "waited", "scale")
    return Position(**{n: state[n] for n in names if n in state}, sums=defaultdict(float, state.get("sums", {})))


def fingerprint(samples: Dataset, comm: Comm) -> dict[str, Any]:
    """What tells whether two inputs have the same snapshots, however they are cut: their list, and the bits of one.

    listed: sha256 of number, trajectory and frame in training and validation; bits: the sum, over all nodes of the first
    training sample, of its positions' and targets' bits as integers, exact in any order.
    """
    numbers = [n for split in ("train", "valid") for n in samples.splits[split]]
    text = json.dumps([[n, *samples.frames[n]] for n in numbers] + [len(samples.splits["train"])])
    graph = samples[samples.splits["train"][0]]
    bits = sum(graph.ndata[name].contiguous().view(torch.int32).long().sum() for name in ("x", "y"))
    return {"listed": hashlib.sha256(text.encode()).hexdigest(), "bits": int(comm.sum(torch.as_tensor(bits)))}


def _agreed(comm: Comm, folder: Path) -> tuple[dict[str, Any], str]:
    """`checkpoint.load_last` of rank 0, on all ranks: others may not see the folder. Its Failure is everybody's."""
    content, failed, wrong = b"", "", ""
    if comm.rank == 0:
        try:
            content, wrong = checkpoint.newest(folder)
        except Failure as failure:
            failed = str(failure)
    failed, wrong = json.loads(comm.share(json.dumps([failed, wrong]).encode()))
    if failed:
        raise Failure(failed)
    return checkpoint.parsed(comm.share(content), folder / checkpoint.LAST), wrong


def restore(comm: Comm, config: Config, model: Any, optimizer: Any, print_of: dict[str, Any]) -> tuple[Position, str]:
    """Take up a run from its last checkpoint; also returns what is wrong with last.pt, if an older one was taken.

    Raises Failure where the samples are not those that the run was begun with.
    """
    folder = Path(config.run.dir)
    state, wrong = _agreed(comm, folder)
    before = state.get("samples", print_of)
    if before["listed"] != print_of["listed"] or before["bits"] != print_of["bits"]:
        what = "frames" if before["listed"] != print_of["listed"] else "positions"
        raise Failure(
            f"{config.data.path}: its {what} are not those that {folder} was trained on; name the same data, "
            "or a store made from them"
        )
    checkpoint.load_weights(model, state, folder / checkpoint.LAST)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return position_of(state), wrong


def begun(folder: Path) -> bool:
    """Whether there is a run to resume."""
    there = (folder / checkpoint.LAST).exists() or (folder / checkpoint.PREVIOUS).exists()
    return there and (folder / "config.yaml").exists()


def finished(folder: Path, settings: Train) -> bool:
    """Whether a run has come to the end that the settings name."""
    return position_of(checkpoint.load_last(folder)[0]).over(settings)


def check_run(folder: Path) -> None:
    """Raise Failure where there is no run."""
    if not (folder / "config.yaml").is_file():
        raise Failure(f"{folder}: not a run (no config.yaml); `distegnn train` makes one")


def check_fresh(config: Config) -> None:
    """Raise Failure where a new run would overwrite something."""
    folder = Path(config.run.dir)
    if begun(folder):
        raise Failure(
            f"{folder}: holds a run already; choose another run.dir, or go on: distegnn train --resume {folder}"
        )
    for name in ("metrics.csv", checkpoint.BEST):
        if (folder / name).exists():
            raise Failure(f"{folder}: has {name}, but no config.yaml and checkpoint: choose another run.dir")


def check_resumed(config: Config) -> None:
    """Raise Failure where a run cannot go on under a config: other settings, or files that are missing."""
    folder = Path(config.run.dir)
    check_run(folder)
    for key, was, now in configs.differences(configs.load(folder / "config.yaml"), config, FREE):
        raise Failure(
            f"{folder}: begun with {key}={was}, not {now}; a resume keeps it. It may change: {', '.join(FREE[:-1])}; "
            "begin another run for the rest"
        )
    position = position_of(checkpoint.load_last(folder)[0])
    half = "was the folder copied whole? Copy it again"
    if position.best < math.inf and not (folder / checkpoint.BEST).is_file():
        raise Failure(f"{folder / checkpoint.BEST}: missing; {half}")
    rows = len(metrics.rows_before(folder / "metrics.csv", position.epoch))
    if rows < position.epoch:
        raise Failure(f"{folder / 'metrics.csv'}: has {rows} of {position.epoch} epochs; {half}")
