"""Checkpoints: written completely or not at all, read without running code from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .errors import Failure

FORMAT, VERSION = "dist_egnn.checkpoint", 1


def _on_cpu(state: Any) -> Any:
    """The same state, its tensors on the CPU: a checkpoint does not depend on the device that made it."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers and text only (``torch.load(weights_only=True)`` reads it)."""
    fresh = path.with_name(path.name + ".partial")
    with open(fresh, "wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **_on_cpu(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises Failure for a file that is missing, damaged or not ours."""
    if not path.is_file():
        raise Failure(f"{path}: no such checkpoint; is its folder a run of `distegnn train`?")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Failure(
            f"{path}: damaged or not a checkpoint ({type(error).__name__}); use another one of the run"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Failure(f"{path}: not a checkpoint of this program")
    if state["version"] != VERSION:
        raise Failure(f"{path}: checkpoint version {state['version']}, this program reads {VERSION}")
    return state


def load_weights(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a model; Failure names the first parameter that does not fit."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise Failure(f"{path}: its weights are not this model's: {reason}") from error
