"""Checkpoints: written completely or not at all, read without running code from them."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import Failure
from ..utils import filesystem

FORMAT, VERSION = "dist_egnn.checkpoint", 2
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class Damaged(Failure):
    """A checkpoint that is not as it was written."""


def _on_cpu(state: Any) -> Any:
    """The same state, its tensors on the CPU: a checkpoint does not depend on the device that made it."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers and text only (``torch.load(weights_only=True)`` reads it).

    The file ends with the sha256 of all before, as the comment that a zip archive may have.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **_on_cpu(state)}, buffer)
    content = buffer.getvalue()[:-2] + len(_comment(b"")).to_bytes(2, "little")  # the archive's last field: its length
    filesystem.write_whole(path, content + _comment(content))


def _comment(content: bytes) -> bytes:
    return b"sha256 " + hashlib.sha256(content).hexdigest().encode()


def save_last(folder: Path, state: dict[str, Any], keep: bool = True) -> None:
    """Write last.pt; the one before becomes previous.pt, unless it is not worth keeping."""
    last = folder / LAST
    if keep and last.exists():  # between the two renames there is no last.pt; then `load_last` takes previous.pt
        os.replace(last, folder / PREVIOUS)
    save(last, state)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises Failure for a file that is missing or not ours, Damaged for one that is not whole."""
    return parsed(_content(path), path)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise Failure(f"{path}: no such checkpoint; is its folder a run of `distegnn train`?")
    return path.read_bytes()


def parsed(content: bytes, path: Path) -> dict[str, Any]:
    """The checkpoint that a file held. Raises Failure as ``load`` does."""
    end = len(content) - len(_comment(b""))
    marked = end > 0 and content[end:].startswith(b"sha256 ")
    if marked and content[end:] != _comment(content[:end]):
        raise Damaged(f"{path}: damaged: its content is not what was written (sha256); use another one of the run")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Damaged(
            f"{path}: damaged or not a checkpoint ({type(error).__name__}); use another one of the run"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Failure(f"{path}: not a checkpoint of this program")
    if state["version"] == 1:  # had no checksum, and stood at the end of an epoch always
        return {**state, "epoch": state["epoch"] + 1, "scale": 1.0}
    if state["version"] != VERSION:
        raise Failure(f"{path}: checkpoint version {state['version']}, this program reads {VERSION}: use a newer one")
    if not marked:
        raise Damaged(f"{path}: damaged: its end is missing; use another one of the run")
    return state


def load_last(folder: Path) -> tuple[dict[str, Any], str]:
    """The newest whole checkpoint of a run, and what is wrong with last.pt if it is not that one ("": nothing)."""
    content, wrong = newest(folder)
    return parsed(content, folder / LAST), wrong


def newest(folder: Path) -> tuple[bytes, str]:
    """What ``load_last`` reads, as the file holds it."""
    try:
        return _whole(folder / LAST), ""
    except Damaged as error:
        wrong = str(error).split(";")[0]
    except Failure as failure:
        if (folder / LAST).exists() or not (folder / PREVIOUS).exists():
            raise
        wrong = str(failure).split(";")[0]
    try:
        return _whole(folder / PREVIOUS), wrong
    except Failure as failure:
        raise Failure(f"{wrong}; and {failure}") from failure


def _whole(path: Path) -> bytes:
    content = _content(path)
    parsed(content, path)
    return content


def load_weights(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a model; Failure names the first parameter that does not fit."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise Failure(f"{path}: its weights are not this model's: {reason}") from error
