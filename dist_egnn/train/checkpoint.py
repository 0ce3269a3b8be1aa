"""Checkpoints: what they contain, how they are written and read, and how a run resumes from its last one.

Keys: `model` and `config` (YAML) in all; in those of a training also `optimizer`, `rng`, `samples` (`fingerprint` of
the data), `data` (data/identity.py), `widths` (F, K), `init` (initial_weights.py),
`unaveraged` (weight_average.py) and the fields of `TrainingState`.
docs/outputs.md describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch.nn import Module

from .. import config as configs
from ..config import Config, Data
from ..data import identity
from ..data.dataset import Dataset
from ..data.trajectories import SPLITS
from ..distributed.comm import Comm
from ..errors import Failure
from ..utils import filesystem
from .run_dir import BEST, CONFIG, LAST, METRICS, PREVIOUS, check_is_run
from .state import TrainingState

if TYPE_CHECKING:
    from .trainer import Trainer

FORMAT, VERSION = "dist_egnn.checkpoint", 2
Checkpoint = dict[str, Any]


# Keys that a resume may change: how a run is executed, and remedies for one that diverged or had too little time.
FREE = (
    *("train.epochs", "train.patience", "train.lr", "train.clip"),
    *("train.device", "train.backend", "train.timeout_s", "train.checkpoint_minutes", "train.kept", "train.replicas"),
    *("train.threads", "train.select_data", "train.callbacks"),
    *("model.engine", "model.tile", "data.path", "run.dir"),
    *("partition.parts", "partition.method", "partition.seed", "partition.weights"),
)


class Damaged(Failure):
    """A checkpoint whose content is not what was written."""


def weights_only(model: Module, config: Config) -> Checkpoint:
    """A checkpoint for prediction and evaluation, which no training resumes from."""
    return {"model": model.state_dict(), "config": configs.to_yaml(config)}


def of_training(trainer: Trainer) -> Checkpoint:
    """A checkpoint to resume from."""
    with trainer.average.applied():
        weights = weights_only(trainer.model, trainer.config)
        unaveraged = trainer.average.unaveraged()
    return {
        **weights,
        **({"unaveraged": unaveraged} if unaveraged else {}),
        "widths": list(trainer.samples.widths),
        "optimizer": trainer.optimizer.state_dict(),
        "rng": torch.get_rng_state(),  # one for all ranks: every rank makes the same draws
        **vars(trainer.state) | {"sums": dict(trainer.state.sums)},
        "samples": trainer.fingerprint,
        "data": trainer.identity,
        **({"init": trainer.init} if trainer.init else {}),
    }


def training_state(checkpoint: Checkpoint) -> TrainingState:
    """The training state in a checkpoint; fields that an older version did not write have their default."""
    values = {name: checkpoint[name] for name in vars(TrainingState()) if name in checkpoint}
    return TrainingState(**values | {"sums": defaultdict(float, values.get("sums", {}))})


def load_weights(
    model: Module,
    checkpoint: Checkpoint,
    path: Path,
    remedy: str = "put back the files of one run: its checkpoint and its config.yaml",
) -> None:
    """Load a checkpoint's weights into a model. Raises Failure naming the first parameter that does not fit, and if the
    model was built with the statistics of other data."""
    present, stored = getattr(model, "statistics", None), checkpoint["model"].get("statistics")
    if present is not None and stored is not None and not present.isnan().any():
        _check_statistics(present.tolist(), stored.tolist(), path)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).splitlines()[:2][-1], 150, placeholder=" …")
        raise Failure(f"{path}: its weights do not fit this model: {reason}; {remedy}") from error


def _check_statistics(present: list[float], stored: list[float], path: Path) -> None:
    if any(not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(present, stored, strict=False)):
        values = [", ".join(f"{value:.6g}" for value in pair) for pair in (stored, present)]
        remedy = "set data.path to the data that it was trained on"
        raise Failure(f"{path}: trained with σ_v, σ_a = {values[0]}, the training split has {values[1]}; {remedy}")


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


def restore(trainer: Trainer) -> str:
    """Restore a training on all ranks from `read_last`; returns its warning. Raises Failure for other data."""
    folder = Path(trainer.config.run.dir)
    content, warning = read_on_rank_0(trainer.comm.world, lambda: read_last(folder))
    last = parse(content, folder / LAST)
    for key, what in (("listed", "frames"), ("bits", "positions")):
        if "samples" in last and last["samples"][key] != trainer.fingerprint[key]:
            source, remedy = trainer.config.data.path, "set data.path to the same data, or to a store made from them"
            raise Failure(f"{source}: its {what} are not those that {folder} was trained on; {remedy}")
    compare_data(last.get("data"), trainer.identity, trainer.config.data, folder, ("train", "valid"))
    trainer.identity = trainer.identity or last.get("data")
    load_weights(trainer.model, last, folder / LAST)
    trainer.average.restore(last.get("unaveraged", {}))
    trainer.optimizer.load_state_dict(last["optimizer"])
    torch.set_rng_state(last["rng"])
    trainer.state, trainer.init = training_state(last), last.get("init")
    return warning


def read_on_rank_0(world: Comm, read: Callable[[], tuple[bytes, str]]) -> tuple[bytes, str]:
    """What read() returns on rank 0, or its Failure, on all ranks: others may not see the file. A collective call."""
    content, text, error = b"", "", ""
    if world.rank == 0:
        try:
            content, text = read()
        except Failure as failure:
            error = str(failure)
    error, text = json.loads(world.broadcast(json.dumps([error, text]).encode()))
    if error:
        raise Failure(error)
    return world.broadcast(content), text


def compare_data(
    before: identity.Identity | None,
    now: identity.Identity | None,
    data: Data,
    folder: Path,
    splits: Collection[str] = SPLITS,
) -> None:
    """Raise Failure that names what has changed in the data since the training. None: not known."""
    if before and now and (changed := identity.changes(before, now, data, splits)):
        remedy = "restore the data, or train a new run"
        raise Failure(f"{data.path}: not what {folder} was trained on: other {', '.join(changed)}; {remedy}")


def _on_cpu(value: Any) -> Any:
    """Move all tensors of a nested structure to the CPU, so that a checkpoint does not depend on the device."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of tensors, numbers and text only, which ``torch.load(weights_only=True)`` reads.

    The file ends with the sha256 of everything before it, in the comment field of the zip archive.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **_on_cpu(checkpoint)}, buffer)
    content = buffer.getvalue()[:-2] + len(_comment(b"")).to_bytes(2, "little")  # the last field: the comment's length
    filesystem.write_atomically(path, content + _comment(content))


def _comment(content: bytes) -> bytes:
    return b"sha256 " + hashlib.sha256(content).hexdigest().encode()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises Failure if it is missing or of another program, Damaged if its content is."""
    return _read(path)[1]


def read(path: Path) -> bytes:
    """The content of a checkpoint's file, checked. Raises Failure as ``load`` does."""
    return _read(path)[0]


def _read(path: Path) -> tuple[bytes, Checkpoint]:
    if not path.is_file():
        raise Failure(f"{path}: no such checkpoint; is its folder a run of `distegnn train`?")
    content = path.read_bytes()
    return content, parse(content, path)


def parse(content: bytes, path: Path) -> Checkpoint:
    """The checkpoint in the content of a file. Raises Failure as ``load`` does."""
    remedy = "use another checkpoint of the run"
    end = len(content) - len(_comment(b""))
    has_checksum = end > 0 and content[end:].startswith(b"sha256 ")
    if has_checksum and content[end:] != _comment(content[:end]):
        raise Damaged(f"{path}: damaged: its sha256 does not match; {remedy}")
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        raise Damaged(f"{path}: damaged or not a checkpoint ({type(error).__name__}); {remedy}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Failure(f"{path}: not a checkpoint of dist_egnn")
    version = checkpoint["version"]
    if version == 1:  # has no checksum, and was always written at the end of an epoch
        return {**checkpoint, "epoch": checkpoint["epoch"] + 1, "scale": 1.0}
    if version != VERSION:
        raise Failure(f"{path}: checkpoint version {version}, this program reads {VERSION}; use a newer dist_egnn")
    if not has_checksum:
        raise Damaged(f"{path}: damaged: its end is missing; {remedy}")
    return checkpoint


def last_state(folder: Path) -> TrainingState:
    """The training state in the newest intact checkpoint of a run."""
    return training_state(parse(read_last(folder)[0], folder / LAST))


def read_last(folder: Path) -> tuple[bytes, str]:
    """The content of the newest intact checkpoint of a run, and why it is not last.pt (empty if it is)."""
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        return _read(last)[0], ""
    except Failure as failure:
        if not isinstance(failure, Damaged) and (last.exists() or not previous.exists()):
            raise
        warning = str(failure).split(";")[0]
    try:
        return _read(previous)[0], warning
    except Failure as failure:
        raise Failure(f"{warning}; and {failure}") from failure


def first_rows(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The rows of so many epochs of a metrics.csv, exactly as written. Raises Failure if the file is damaged."""
    if not path.is_file():
        return []
    try:
        table = pd.read_csv(path, float_precision="round_trip")
        table["epoch"] += int(table["epoch"].min() == 0)  # older versions counted from 0
        return table[table["epoch"] <= epochs].to_dict("records")
    except (ValueError, KeyError) as error:  # of pandas, for text that is no such table
        raise Failure(f"{path}: not the metrics of a run ({str(error).splitlines()[0]}); copy it again") from error


def check_resume(config: Config) -> None:
    """Raise Failure if the run in run.dir cannot be resumed under a config: other settings, or missing files."""
    folder = Path(config.run.dir)
    check_is_run(folder)
    for key, before, now in configs.differences(configs.load(folder / CONFIG, published=True), config, FREE):
        remedy = f"start a new run, or change only {', '.join(FREE[:-1])}"
        raise Failure(f"{folder}: was started with {key}={before}, not {now}; {remedy}")
    state, remedy = last_state(folder), "the copy is incomplete: copy it again"
    if state.best < math.inf and not (folder / BEST).is_file():
        raise Failure(f"{folder / BEST}: missing; {remedy}")
    if (rows := len(first_rows(folder / METRICS, state.epoch))) < state.epoch:
        raise Failure(f"{folder / METRICS}: has {rows} of {state.epoch} epochs; {remedy}")
