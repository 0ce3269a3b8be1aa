"""Checkpoints: what they contain, and files that are written completely or not at all and read without running code.

Keys: `model` and `config` (YAML) in all; in those of a training also `optimizer`, `rng`, `samples` (the fingerprint of
the data, see resume.py) and the fields of `TrainingState`. docs/outputs.md describes the format.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from .. import config as configs
from ..config import Config
from ..errors import Failure
from ..utils import filesystem
from .run_dir import LAST, PREVIOUS
from .state import TrainingState

FORMAT, VERSION = "dist_egnn.checkpoint", 2
Checkpoint = dict[str, Any]


class Damaged(Failure):
    """A checkpoint whose content is not what was written."""


def weights_only(model: Module, config: Config) -> Checkpoint:
    """A checkpoint for prediction and evaluation, which no training resumes from."""
    return {"model": model.state_dict(), "config": configs.to_yaml(config)}


def of_training(
    model: Module, config: Config, optimizer: Optimizer, state: TrainingState, samples: dict[str, Any]
) -> Checkpoint:
    """A checkpoint to resume from. samples: `resume.fingerprint` of the data."""
    training = {"optimizer": optimizer.state_dict(), **vars(state), "sums": dict(state.sums), "samples": samples}
    # one random state for all ranks: every rank makes the same draws
    return weights_only(model, config) | training | {"rng": torch.get_rng_state()}


def training_state(checkpoint: Checkpoint) -> TrainingState:
    """The training state in a checkpoint; fields that an older version did not write have their default."""
    values = {name: checkpoint[name] for name in vars(TrainingState()) if name in checkpoint}
    return TrainingState(**values | {"sums": defaultdict(float, values.get("sums", {}))})


def load_weights(model: Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load a checkpoint's weights into a model. Raises Failure naming the first parameter that does not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[:2][-1].strip()
        raise Failure(f"{path}: its weights do not fit this model: {reason}") from error


def restore(checkpoint: Checkpoint, model: Module, optimizer: Optimizer, path: Path) -> TrainingState:
    """Load model, optimizer and random state from a checkpoint of a training; returns the training state."""
    load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])
    return training_state(checkpoint)


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
    return parse(_read(path), path)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise Failure(f"{path}: no such checkpoint; is its folder a run of `distegnn train`?")
    return path.read_bytes()


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


def load_last(folder: Path) -> Checkpoint:
    """The newest intact checkpoint of a run."""
    return parse(read_last(folder)[0], folder / LAST)


def read_last(folder: Path) -> tuple[bytes, str]:
    """The content of the newest intact checkpoint of a run, and why it is not last.pt (empty if it is)."""
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        parse(content := _read(last), last)
        return content, ""
    except Failure as failure:
        if not isinstance(failure, Damaged) and (last.exists() or not previous.exists()):
            raise
        warning = str(failure).split(";")[0]
    try:
        parse(content := _read(previous), previous)
        return content, warning
    except Failure as failure:
        raise Failure(f"{warning}; and {failure}") from failure
