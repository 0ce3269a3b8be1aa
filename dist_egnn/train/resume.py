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
from . import checkpoint, metrics_log, run_dir
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


def _load_on_all_ranks(comm: Comm, folder: Path) -> tuple[checkpoint.Checkpoint, str]:
    """`checkpoint.load_last` of rank 0 on every rank, also its Failure: other ranks may not see the folder."""
    content, error, warning = b"", "", ""
    if comm.rank == 0:
        try:
            content, warning = checkpoint.read_last(folder)
        except Failure as failure:
            error = str(failure)
    error, warning = json.loads(comm.broadcast(json.dumps([error, warning]).encode()))
    if error:
        raise Failure(error)
    return checkpoint.parse(comm.broadcast(content), folder / run_dir.LAST), warning


def restore(
    comm: Comm, config: Config, model: Module, optimizer: Optimizer, samples: dict[str, Any]
) -> tuple[TrainingState, str]:
    """Restore a run from its last checkpoint; also returns why an older one was used instead of last.pt, if so.

    samples: fingerprint of the data. Raises Failure if the run was trained on other data.
    """
    folder = Path(config.run.dir)
    last, warning = _load_on_all_ranks(comm, folder)
    trained_on = last.get("samples", samples)
    for key, what in (("listed", "frames"), ("bits", "positions")):
        if trained_on[key] != samples[key]:
            raise Failure(
                f"{config.data.path}: its {what} are not those that {folder} was trained on; set data.path to the same "
                "data, or to a store made from them"
            )
    return checkpoint.restore(last, model, optimizer, folder / run_dir.LAST), warning


def finished(folder: Path, settings: Train) -> bool:
    """Whether a run has reached the end that the settings define."""
    return checkpoint.training_state(checkpoint.load_last(folder)[0]).finished(settings)


def check_resume(config: Config) -> None:
    """Raise Failure if the run in run.dir cannot be resumed under a config: other settings, or missing files."""
    folder = Path(config.run.dir)
    run_dir.check_is_run(folder)
    for key, before, now in configs.differences(configs.load(folder / run_dir.CONFIG), config, FREE):
        raise Failure(
            f"{folder}: was started with {key}={before}, not {now}; a resume may only change {', '.join(FREE[:-1])}; "
            "start a new run to change others"
        )
    state = checkpoint.training_state(checkpoint.load_last(folder)[0])
    remedy = "the copy of the folder is incomplete: copy it again"
    if state.best < math.inf and not (folder / run_dir.BEST).is_file():
        raise Failure(f"{folder / run_dir.BEST}: missing; {remedy}")
    rows = len(metrics_log.rows_before(folder / run_dir.METRICS, state.epoch))
    if rows < state.epoch:
        raise Failure(f"{folder / run_dir.METRICS}: has {rows} of {state.epoch} epochs; {remedy}")
