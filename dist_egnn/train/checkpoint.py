"""Checkpoints: what they contain, and files that are written completely or not at all and read without running code.

Keys: `model` and `config` (YAML) in all; in those of a training also `optimizer`, `rng`, `samples` (the fingerprint of
the data, see resume.py) and the fields of `TrainingState`. docs/outputs.md describes the format.
"""

from __future__ import annotations

import hashlib
import io
import os
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
    return {
        **weights_only(model, config),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),  # one for all ranks: every rank makes the same draws
        **vars(state) | {"sums": dict(state.sums)},
        "samples": samples,
    }


def training_state(checkpoint: Checkpoint) -> TrainingState:
    """The training state in a checkpoint; fields that an older version did not write have their default."""
    values = {name: checkpoint[name] for name in vars(TrainingState()) if name in checkpoint}
    return TrainingState(**values | {"sums": defaultdict(float, values.get("sums", {}))})


def load_weights(model: Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load a checkpoint's weights into a model. Raises Failure naming the first parameter that does not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise Failure(f"{path}: its weights do not fit this model: {reason}") from error


def restore(checkpoint: Checkpoint, model: Module, optimizer: Optimizer, path: Path) -> TrainingState:
    """Load model, optimizer and random state from a checkpoint of a training; returns the training state."""
    load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])
    return training_state(checkpoint)


def _on_cpu(value: Any) -> Any:
    """Move all tensors of a nested structure to the CPU, so that a checkpoint does not depend on the device."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


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


def save_last(folder: Path, checkpoint: Checkpoint, keep_previous: bool = True) -> None:
    """Write last.pt. keep_previous: the present last.pt becomes previous.pt."""
    last = folder / LAST
    if keep_previous and last.exists():  # between the two renames there is no last.pt: `load_last` reads previous.pt
        os.replace(last, folder / PREVIOUS)
    save(last, checkpoint)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises Failure if it is missing or of another program, Damaged if its content is."""
    return parse(_read(path), path)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise Failure(f"{path}: no such checkpoint; is its folder a run of `distegnn train`?")
    return path.read_bytes()


def parse(content: bytes, path: Path) -> Checkpoint:
    """The checkpoint in the content of a file. Raises Failure as ``load`` does."""
    end = len(content) - len(_comment(b""))
    has_checksum = end > 0 and content[end:].startswith(b"sha256 ")
    if has_checksum and content[end:] != _comment(content[:end]):
        raise Damaged(f"{path}: damaged: its sha256 does not match; use another checkpoint of the run")
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        kind = type(error).__name__
        raise Damaged(f"{path}: damaged or not a checkpoint ({kind}); use another checkpoint of the run") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Failure(f"{path}: not a checkpoint of dist_egnn")
    if checkpoint["version"] == 1:  # has no checksum, and was always written at the end of an epoch
        return {**checkpoint, "epoch": checkpoint["epoch"] + 1, "scale": 1.0}
    if checkpoint["version"] != VERSION:
        raise Failure(
            f"{path}: checkpoint version {checkpoint['version']}, this program reads {VERSION}; use a newer dist_egnn"
        )
    if not has_checksum:
        raise Damaged(f"{path}: damaged: its end is missing; use another checkpoint of the run")
    return checkpoint


def load_last(folder: Path) -> tuple[Checkpoint, str]:
    """The newest intact checkpoint of a run, and why it is not last.pt (empty if it is)."""
    content, warning = read_last(folder)
    return parse(content, folder / LAST), warning


def read_last(folder: Path) -> tuple[bytes, str]:
    """The content of the file that ``load_last`` reads, and the same warning."""
    try:
        return _read_intact(folder / LAST), ""
    except Failure as failure:
        missing = not (folder / LAST).exists() and (folder / PREVIOUS).exists()
        if not (missing or isinstance(failure, Damaged)):
            raise
        warning = str(failure).split(";")[0]
    try:
        return _read_intact(folder / PREVIOUS), warning
    except Failure as failure:
        raise Failure(f"{warning}; and {failure}") from failure


def _read_intact(path: Path) -> bytes:
    content = _read(path)
    parse(content, path)
    return content
