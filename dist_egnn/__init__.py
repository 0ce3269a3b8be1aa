"""Equivariant graph networks with virtual nodes on geometric graphs too large for one device.

`__all__` lists the public names. Each is imported on its first use: importing the package loads neither torch nor DGL.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .data import dgl_compat

if TYPE_CHECKING:
    from pathlib import Path

    from .commands.fit import fit, save
    from .config import Config
    from .config import load as load_config
    from .data.dataset import open_dataset
    from .data.store import Store
    from .data.trajectories import Trajectories, Writer, unwrap
    from .errors import Failure
    from .evaluate.predictor import Predictor
    from .evaluate.vtkhdf import Rollout
    from .models.base import Layer, direction, displacement
    from .models.mlp import coordinate_mlp
    from .models.network import EGNN, RF, TFN, FastEGNN, FastRF, FastSchNet, FastTFN, Linear, Network, SchNet

__version__ = "0.2.0"
__all__ = ["Config", "Failure", "Predictor", "Rollout", "Store", "Trajectories", "Writer"]
__all__ += ["fit", "load", "load_config", "open_dataset", "save", "unwrap"]
__all__ += ["EGNN", "RF", "TFN", "FastEGNN", "FastRF", "FastSchNet", "FastTFN", "Linear", "SchNet"]
__all__ += ["Layer", "Network", "coordinate_mlp", "direction", "displacement"]  # for models of your own

_MODULES = {
    "commands.fit": ["fit", "save"],
    "config": ["Config", "load_config"],
    "data.dataset": ["open_dataset"],
    "data.store": ["Store"],
    "data.trajectories": ["Trajectories", "Writer", "unwrap"],
    "errors": ["Failure"],
    "evaluate.predictor": ["Predictor"],
    "evaluate.vtkhdf": ["Rollout"],
    "models.base": ["Layer", "direction", "displacement"],
    "models.mlp": ["coordinate_mlp"],
}

os.environ.setdefault("DGLBACKEND", "pytorch")  # before the first import of DGL, which prints a question otherwise
dgl_compat.hide_graphbolt()


def load(run_or_checkpoint: str | Path, device: str = "cpu", processes: int = 1) -> Predictor:
    """The model of a run (its best.pt) or of a checkpoint, as a function of arrays, see docs/inference.md.

    device: cpu, cuda, cuda:N or auto. processes: that share each graph. Raises Failure for a file that cannot be read.
    """
    from .errors import Failure

    if processes < 1:
        raise Failure(f"processes={processes}: must be at least 1")
    if processes > 1:
        from .evaluate.parallel_predictor import ParallelPredictor

        return ParallelPredictor(run_or_checkpoint, processes, device)
    from .evaluate.predictor import Predictor

    return Predictor(run_or_checkpoint, device)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dist_egnn' has no attribute '{name}'")
    module = next((module for module, names in _MODULES.items() if name in names), "models.network")
    return getattr(importlib.import_module(f".{module}", __name__), "load" if name == "load_config" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
