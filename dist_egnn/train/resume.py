"""Resuming a run: which settings may change, whether files are complete, restoring the checkpoint on all ranks."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from .. import config as configs
from ..config import Config, Train
from ..data.dataset import Dataset
from ..distributed.comm import Comm
from ..errors import Failure
from . import checkpoint, run_dir
from .run_writer import rows_before
from .state import TrainingState

# Keys that a resume may change: how a run is executed rather than what it computes, and remedies for one that diverged
# or had too little time.
FREE = (
    *("train.epochs", "train.patience", "train.lr", "train.clip"),
    *("train.device", "train.timeout_s", "train.checkpoint_minutes", "train.kept", "train.replicas"),
    *("model.engine", "model.tile", "data.path", "run.dir"),
    *("partition.parts", "partition.method", "partition.seed", "partition.weights"),
)


def fingerprint(samples: Dataset, comm: Comm) -> dict[str, Any]:
    """A summary that is equal for the same snapshots, however they are partitioned.

    listed: sha256 of number, trajectory and frame of the training and validation snapshots; bits: the sum, over all
    nodes of the first training sample, of the bits of positions and targets as integers, which is exact in any order.
    """
    numbers = [n for split in ("train", "valid") for n in samples.splits[split]]
    text = json.dumps([[n, *samples.frames[n]] for n in numbers] + [len(samples.splits["train"])])
    graph = samples[samples.splits["train"][0]]
    bits = sum(graph.ndata[name].contiguous().view(torch.int32).long().sum() for name in ("x", "y"))
    return {"listed": hashlib.sha256(text.encode()).hexdigest(), "bits": int(comm.sum(torch.as_tensor(bits)))}


def restore(
    comm: Comm, config: Config, model: Module, optimizer: Optimizer, samples: dict[str, Any]
) -> tuple[TrainingState, str]:
    """Restore a run from its last checkpoint; also returns why an older one was used instead of last.pt, if so.

    samples: fingerprint of the data. Raises Failure if the run was trained on other data.
    """
    folder, content, warning, error = Path(config.run.dir), b"", "", ""
    if comm.rank == 0:  # other ranks may not see the folder
        try:
            content, warning = checkpoint.read_last(folder)
        except Failure as failure:
            error = str(failure)
    error, warning = json.loads(comm.broadcast(json.dumps([error, warning]).encode()))
    if error:
        raise Failure(error)
    last = checkpoint.parse(comm.broadcast(content), folder / run_dir.LAST)
    trained_on = last.get("samples", samples)
    for key, what in (("listed", "frames"), ("bits", "positions")):
        if trained_on[key] != samples[key]:
            remedy = "set data.path to the same data, or to a store made from them"
            raise Failure(f"{config.data.path}: its {what} are not those that {folder} was trained on; {remedy}")
    return checkpoint.restore(last, model, optimizer, folder / run_dir.LAST), warning


def finished(folder: Path, settings: Train) -> bool:
    """Whether a run has reached the end that the settings define."""
    return checkpoint.training_state(checkpoint.load_last(folder)).finished(settings)


def check_resume(config: Config) -> None:
    """Raise Failure if the run in run.dir cannot be resumed under a config: other settings, or missing files."""
    folder = Path(config.run.dir)
    run_dir.check_is_run(folder)
    for key, before, now in configs.differences(configs.load(folder / run_dir.CONFIG), config, FREE):
        remedy = f"start a new run, or change only {', '.join(FREE[:-1])}"
        raise Failure(f"{folder}: was started with {key}={before}, not {now}; {remedy}")
    state, remedy = checkpoint.training_state(checkpoint.load_last(folder)), "the copy is incomplete: copy it again"
    if state.best < math.inf and not (folder / run_dir.BEST).is_file():
        raise Failure(f"{folder / run_dir.BEST}: missing; {remedy}")
    if (rows := len(rows_before(folder / run_dir.METRICS, state.epoch))) < state.epoch:
        raise Failure(f"{folder / run_dir.METRICS}: has {rows} of {state.epoch} epochs; {remedy}")
