"""The progress of a training run: what steps change besides the weights and the optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from ..config import Train
from . import optim


@dataclass
class TrainingState:
    """The same on every rank; the field names are keys of a checkpoint.

    epoch: the current epoch; step: its completed optimizer steps; sums: totals over these steps, see `trainer.steps`;
    best: lowest validation MSE; waited: epochs since then; scale: factor of the learning rate, see optim.py.
    """

    epoch: int = 0
    step: int = 0
    best: float = math.inf
    waited: int = 0
    scale: float = 1.0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def finished(self, settings: Train) -> bool:
        """Whether `train.epochs` or `train.patience` ends the training here."""
        if self.epoch >= settings.epochs:
            return True
        return bool(settings.patience and self.step == 0 and self.waited >= settings.patience)

    def end_epoch(self, valid_mse: float, settings: Train) -> bool:
        """Move to the start of the next epoch; returns whether the validation MSE improved."""
        improved = valid_mse < self.best
        self.best, self.waited = (valid_mse, 0) if improved else (self.best, self.waited + 1)
        self.scale = optim.plateau_scale(settings, self.waited, self.scale)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, defaultdict(float)
        return improved
