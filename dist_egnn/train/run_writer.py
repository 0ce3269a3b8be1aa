"""What rank 0 of a training writes into the run's folder: config.yaml, about.yaml, checkpoints, metrics."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .. import config as configs
from ..config import Config
from ..utils import filesystem
from . import checkpoint, diagnostics, provenance, run_dir
from .metrics_log import MetricsLog
from .state import TrainingState


class RunWriter:
    """Writes checkpoints and metrics in an order that survives a kill between any two writes; a context manager.

    samples: fingerprint of the data. Model, optimizer and state are read at each checkpoint.
    """

    def __init__(
        self, config: Config, model: Module, optimizer: Optimizer, state: TrainingState, samples: dict[str, Any]
    ) -> None:
        self.config, self.model, self.optimizer, self.state, self.samples = config, model, optimizer, state, samples
        self.folder = Path(config.run.dir)
        self.last_save = time.monotonic()

    def open(self, ranks: int, resumed: bool, warning: str = "") -> RunWriter:
        """Start or continue the run's folder. warning: why the run resumes from previous.pt."""
        config, state = self.config, self.state
        if not resumed:  # before config.yaml, so that a folder with config.yaml has a checkpoint
            self.save(keep_previous=False)
        elif warning:
            source = f"{self.folder / run_dir.PREVIOUS} (epoch {state.epoch}, step {state.step})"
            print(f"warning: {warning}; resuming from {source}", file=sys.stderr)
            self.save(keep_previous=False)  # replace the damaged last.pt, keep previous.pt
        filesystem.write_atomically(self.folder / run_dir.CONFIG, configs.to_yaml(config).encode())
        seeds = {"train": config.train.seed, "frames": config.data.frame_seed, "partition": config.partition.seed}
        start = {"epoch": state.epoch, "step": state.step}
        provenance.append(self.folder / "about.yaml", start | provenance.describe(ranks, config.train.device, seeds))
        self.log = MetricsLog(self.folder, state.epoch)
        return self

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def checkpoint_due(self) -> bool:
        """Whether `train.checkpoint_minutes` have passed since the last checkpoint."""
        return time.monotonic() - self.last_save >= 60 * self.config.train.checkpoint_minutes

    def _checkpoint(self) -> checkpoint.Checkpoint:
        """Raises Failure for weights that are not finite, so that last.pt still holds the last good checkpoint."""
        if problem := diagnostics.nonfinite_parameter(self.model):
            raise diagnostics.divergence(self.config, self.state.epoch, self.state.step, problem)
        return checkpoint.of_training(self.model, self.config, self.optimizer, self.state, self.samples)

    def save(self, keep_previous: bool = True) -> None:
        """Write last.pt. keep_previous: the present last.pt becomes previous.pt."""
        checkpoint.save_last(self.folder, self._checkpoint(), keep_previous)
        self.last_save = time.monotonic()

    def end_epoch(
        self, epoch: int, row: dict[str, float], memory: list[float], z: Tensor | None, improved: bool
    ) -> None:
        """Record an epoch. last.pt is written last, after metrics.csv and best.pt, which include its epochs."""
        self.log.add(epoch, row, memory, z)
        if improved:
            checkpoint.save(self.folder / run_dir.BEST, self._checkpoint())
        self.save()
