"""Equivariant graph networks with virtual nodes on geometric graphs too large for one device.

Importing this package imports nothing heavy: torch and DGL come with the module that needs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .evaluate.predictor import Predictor

__version__ = "0.1.0"

# DGL asks for its backend on standard output unless it is told; this must stand before its first import.
os.environ.setdefault("DGLBACKEND", "pytorch")


def load(run_or_checkpoint: str | Path, device: str = "cpu") -> Predictor:
    """The model of a run (its best.pt) or of a checkpoint, as a function of arrays; docs/inference.md shows its use.

    device: cpu, cuda, cuda:N or auto. Raises dist_egnn.errors.Failure for what cannot be read.
    """
    from .evaluate.predictor import Predictor

    return Predictor(run_or_checkpoint, device)
