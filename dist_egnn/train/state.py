"""The progress of a training: what steps change besides the weights and the optimizer, and the learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from ..config import Train


@dataclass
class TrainingState:
    """The same on every rank; the field names are keys of a checkpoint."""

    epoch: int = 0
    step: int = 0  # completed optimizer steps of the epoch
    best: float = math.inf  # lowest validation MSE
    waited: int = 0  # epochs from then to the last validation
    scale: float = 1.0  # factor of the learning rate due to plateaus
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # over the steps, see `Trainer.steps`

    def finished(self, settings: Train) -> bool:
        """Whether `train.epochs` or `train.patience` ends the training here."""
        return self.epoch >= settings.epochs or (self.step == 0 and 0 < settings.patience <= self.waited)

    def learning_rate(self, settings: Train, steps: int) -> float:
        """The rate of the next of ``steps`` steps in an epoch, from the state alone, so that a resume needs no scheduler.

        It rises linearly over the first `train.warmup` epochs, step by step. Then "cosine" falls to zero at
        `train.epochs`, epoch by epoch; "plateau" falls as `end_epoch` defines; "constant" stays.
        """
        rate, elapsed = settings.lr * self.scale, self.epoch + (self.step + 1) / steps
        if elapsed < settings.warmup:
            return rate * elapsed / settings.warmup
        if settings.schedule == "cosine":
            fraction = max(self.epoch - settings.warmup, 0.0) / (settings.epochs - settings.warmup)
            rate *= 0.5 * (1 + math.cos(math.pi * fraction))
        return rate

    def validates(self, settings: Train) -> bool:
        """Whether the epoch ends with a validation."""
        return (self.epoch + 1) % settings.valid_interval == 0 or self.epoch + 1 == settings.epochs

    def end_epoch(self, valid_mse: float, settings: Train) -> bool:
        """Move to the start of the next epoch; returns whether a validation took place and its MSE improved."""
        improved = self.validates(settings) and valid_mse < self.best
        if improved:
            self.best, self.waited = valid_mse, 0
        elif self.validates(settings):
            waited, every = self.waited, settings.plateau_epochs
            self.waited += settings.valid_interval
            if settings.schedule == "plateau" and self.waited // every > waited // every:
                self.scale *= settings.plateau_factor
        self.epoch, self.step, self.sums = self.epoch + 1, 0, defaultdict(float)
        return improved
